from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.layouts import (
    COMPRESSED_MXFP4,
    FP8_PER_CHANNEL,
    MODELOPT_NVFP4,
    QUARK_MXFP4,
    Layout,
    check_matrix,
    find_layout,
    stored_tensors,
)
from nybble.engine.errors import CheckpointError
from nybble.kernels import fp8, mxfp4, nvfp4
from nybble.kernels.quantized_tensor import QuantizedTensor

SHAPE = 16, 64
WEIGHT = torch.linspace(-1, 1, 1024).view(SHAPE)
LAYOUTS: list[tuple[Layout, QuantizedTensor]] = [
    (MODELOPT_NVFP4, nvfp4.quantize(WEIGHT)),
    (COMPRESSED_MXFP4, mxfp4.quantize(WEIGHT)),
    (QUARK_MXFP4, mxfp4.quantize(WEIGHT)),
    (FP8_PER_CHANNEL, fp8.quantize(WEIGHT)),
]
each_layout = pytest.mark.parametrize(
    ("layout", "weight"), LAYOUTS, ids=[layout.name for layout, _ in LAYOUTS]
)


def _checkpoint(directory: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint.open(directory)


@each_layout
def test_a_layout_is_told_by_its_tensors(tmp_path: Path, layout: Layout, weight: QuantizedTensor) -> None:
    tensors = stored_tensors("m", weight, layout)
    entries = _checkpoint(tmp_path, tensors).entries
    assert find_layout("m", entries) is layout
    assert set(check_matrix("m", SHAPE, entries)) == set(tensors)


@each_layout
def test_missing_companions_are_named(tmp_path: Path, layout: Layout, weight: QuantizedTensor) -> None:
    tensors = stored_tensors("m", weight, layout)
    for companion in list(tensors)[1:]:
        (tmp_path / companion).mkdir()
        rest = {name: tensor for name, tensor in tensors.items() if name != companion}
        entries = _checkpoint(tmp_path / companion, rest).entries
        with pytest.raises(CheckpointError, match=f"'{companion}' is missing"):
            list(check_matrix("m", SHAPE, entries))


@each_layout
def test_another_shape_is_named(tmp_path: Path, layout: Layout, weight: QuantizedTensor) -> None:
    entries = _checkpoint(tmp_path, stored_tensors("m", weight, layout)).entries
    for shape in ((17, 64), (16, 128)):
        with pytest.raises(CheckpointError, match=r"tensor 'm\.\w+': has shape .* config\.json calls for"):
            list(check_matrix("m", shape, entries))


def test_a_missing_matrix_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"lacks 'm\.weight'"):
        find_layout("m", {})
