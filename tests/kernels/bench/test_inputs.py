"""Random inputs: neither zeros nor overflows, and the same matrices with and without numbers."""

from __future__ import annotations

import pytest
import torch
from triton_device import ARCHES, DEVICE

from nybble.kernels.bench.inputs import BenchInputs, dequantized, natural
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.matmul import Matrix

FORMATS = ["nvfp4", "mxfp4", "fp8", "bf16"]


def inputs(arch: int, device: torch.device = DEVICE) -> BenchInputs:
    return BenchInputs(device, arch)


@pytest.mark.parametrize("format", FORMATS)
def test_products_are_about_as_large_as_activations(format: str) -> None:
    made = inputs(ARCHES[0])
    matrix = made.load(format, 200, 320).matrix
    x = made.activations(50, matrix)
    product = natural(x, 320).float() @ dequantized(matrix, 320).T
    assert 0.4 < product.std() < 2.5 and (product != 0).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("arch", ARCHES)
def test_on_meta_a_matrix_has_the_same_form(arch: int, format: str) -> None:
    real = inputs(arch).load(format, 40, 96)
    meta = inputs(arch, torch.device("meta")).load(format, 40, 96)
    assert meta.source is None and real.source is not None
    assert parts(meta.matrix) == parts(real.matrix)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_on_meta_a_stack_has_the_same_form(format: str) -> None:
    real = inputs(90).load(format, 3, 40, 96).matrix
    meta = inputs(90, torch.device("meta")).load(format, 3, 40, 96).matrix
    assert isinstance(real, Fp4Matrix) and parts(meta) == parts(real)


def test_the_same_each_time() -> None:
    first, second = inputs(90), inputs(90)
    assert torch.equal(first.normal(4, 4), second.normal(4, 4))
    assert sorted(first.shuffled(9).tolist()) == list(range(9))


def parts(matrix: Matrix) -> dict[str, object]:
    """Tensors by their shapes and dtypes."""
    values = vars(matrix)
    return {
        name: (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }
