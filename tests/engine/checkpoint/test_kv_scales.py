"""Scales of an FP8 KV cache, as checkpoints store them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.kv_scales import KVScales, read_kv_scales
from nybble.engine.errors import CheckpointError

ATTENTION = "model.layers.{}.self_attn.{}"


def _checkpoint(directory: Path, scales: dict[str, Tensor]) -> Checkpoint:
    """scales: by their names behind "self_attn.", after the number of the layer."""
    named = {ATTENTION.format(*name.split(" ")): scale for name, scale in scales.items()}
    save_file(named | {"other": torch.zeros(2)}, directory / "model.safetensors")
    return Checkpoint.open(directory)


def test_each_layer_has_its_own(tmp_path: Path) -> None:
    scales = {
        "0 k_proj.k_scale": torch.tensor(0.5),
        "0 v_proj.v_scale": torch.tensor([2.0]),
        "1 v_scale": torch.tensor(3.0, dtype=torch.bfloat16),
        "11 k_scale": torch.tensor(7.0),
    }
    checkpoint = _checkpoint(tmp_path, scales)
    assert read_kv_scales(checkpoint, range(3)) == (KVScales(0.5, 2.0), KVScales(1.0, 3.0), KVScales())
    assert read_kv_scales(checkpoint, [11]) == (KVScales(7.0, 1.0),)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_scale_is_named(tmp_path: Path, scale: float) -> None:
    checkpoint = _checkpoint(tmp_path, {"2 v_proj.v_scale": torch.tensor(scale)})
    message = rf"layers\.2\.self_attn\.v_proj\.v_scale'.* is {scale}, expected a positive number"
    with pytest.raises(CheckpointError, match=message):
        read_kv_scales(checkpoint, range(3))
