"""What backends hold of a model; what its parts are, capacity's tests ask."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.planning.inventory import EMBEDDING, EXPERTS, Group, Inventory
from nybble.kernels.cpu.cpu_matrix import prepare
from nybble.kernels.nvfp4 import quantize

CONFIG = ModelConfig.from_fields(
    json.loads((Path(__file__).parent.parent / "data" / "glm-4.7-config.json").read_text())
)


def test_native_code_holds_fp4_as_stored_and_all_else_in_int8() -> None:
    weight = torch.randn(320, 480)
    as_int8, as_fp4 = prepare(weight), prepare(quantize(weight))
    group = Group(0, False, "attention", None, num_parameters=weight.numel(), num_bytes=weight.numel() * 2)
    fp4 = replace(group, part=EXPERTS, layout="ModelOpt NVFP4", num_bytes=weight.numel() * 9 // 16)
    fp8 = replace(group, part="shared experts", layout="FP8", num_bytes=weight.numel())
    norms = replace(group, part="norms", num_parameters=100, num_bytes=200)
    inventory = Inventory(CONFIG, (group, fp4, fp8, norms))
    row_scales = as_int8.row_scales.nbytes
    assert [held.num_bytes for held in inventory.as_int8().groups] == [
        as_int8.num_bytes - row_scales,
        as_fp4.num_bytes - row_scales,
        as_int8.num_bytes - row_scales,
        400,
    ]


def test_a_tied_embedding_is_a_table_and_a_head() -> None:
    group = Group(None, False, EMBEDDING, None, num_parameters=160, num_bytes=320)
    for is_tied, expected in ((False, 640), (True, 640 + 170)):
        inventory = Inventory(replace(CONFIG, tie_word_embeddings=is_tied), (group,))
        assert [held.num_bytes for held in inventory.as_int8().groups] == [expected]
