"""What backends hold of a model; what its parts are, capacity's tests ask."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from nybble.engine.checkpoint.layouts import FP8_PER_CHANNEL
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.weight_dtypes import WeightDtype, WeightDtypes
from nybble.engine.planning.inventory import EMBEDDING, EXPERTS, Group, Inventory
from nybble.kernels import fp8, nvfp4
from nybble.kernels.cpu.cpu_matrix import prepare

CONFIG = ModelConfig.from_fields(
    json.loads((Path(__file__).parent.parent / "data" / "glm-4.7-config.json").read_text())
)


def test_native_code_holds_fp4_and_fp8_as_stored_and_all_else_in_int8() -> None:
    weight = torch.randn(320, 480)
    as_int8, as_fp4, as_fp8 = prepare(weight), prepare(nvfp4.quantize(weight)), prepare(fp8.quantize(weight))
    group = Group(0, False, "attention", None, num_parameters=weight.numel(), num_bytes=weight.numel() * 2)
    four = replace(group, part=EXPERTS, layout="ModelOpt NVFP4", num_bytes=weight.numel() * 9 // 16)
    eight = replace(group, part="shared experts", layout=FP8_PER_CHANNEL.name, num_bytes=weight.numel())
    norms = replace(group, part="norms", num_parameters=100, num_bytes=200)
    inventory = Inventory(CONFIG, (group, four, eight, norms))
    row_scales = as_int8.row_scales.nbytes
    assert [held.num_bytes for held in inventory.as_int8().groups] == [
        as_int8.num_bytes - row_scales,
        as_fp4.num_bytes - row_scales,
        as_fp8.num_bytes - row_scales,
        400,
    ]


def test_requantizing_to_more_bytes_is_counted() -> None:
    four = Group(
        0, False, "attention", None, layout="ModelOpt NVFP4", block_size=16, num_parameters=160, num_bytes=90
    )
    eight = replace(four, layout=FP8_PER_CHANNEL.name, block_size=1, num_bytes=160)
    plain = replace(eight, layout="BF16", num_bytes=320)
    inventory = Inventory(CONFIG, (four, eight, plain, replace(four, part=EXPERTS)))

    def counted(dtype: WeightDtype) -> list[tuple[int, int]]:
        held = inventory.recast(WeightDtypes(attention_dtype=dtype))
        return [
            (group.num_bytes, cpu.num_bytes)
            for group, cpu in zip(held.groups, held.as_int8().groups, strict=True)
        ]

    assert counted("stored") == [(90, 90), (160, 160), (320, 170), (90, 90)]
    assert counted("bf16") == [(320, 170), (320, 170), (320, 170), (90, 90)]
    assert counted("fp8") == [(160, 160), (160, 160), (320, 170), (90, 90)]


def test_a_tied_embedding_is_a_table_and_a_head() -> None:
    group = Group(None, False, EMBEDDING, None, num_parameters=160, num_bytes=320)
    for is_tied, expected in ((False, 640), (True, 640 + 170)):
        inventory = Inventory(replace(CONFIG, tie_word_embeddings=is_tied), (group,))
        assert [held.num_bytes for held in inventory.as_int8().groups] == [expected]
