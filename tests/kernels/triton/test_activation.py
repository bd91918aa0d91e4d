"""SiLU-mul against torch's, with its roundings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from poison import poisoned as poisoned
from rounding import assert_rounds_alike
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.triton.activation import silu_mul, silu_mul_launch
from nybble.kernels.triton.activation_order import padded_width, to_fragment_order


def _normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def _fused(
    gate_up: Tensor, width: int, fragment_order: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    return silu_mul(
        gate_up,
        fragment_order=fragment_order,
        padded_width=width,
        dtype=dtype or gate_up.dtype,
        launch=silu_mul_launch(len(gate_up), width, ARCHES[0]),
    )


def _reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1536), (1, 1), (3, 63), (7, 96), (17, 192), (2, 1000)], ids=str)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = shape
    gate_up = _normal(rows, 2 * width, scale=4, dtype=dtype)
    padded = padded_width(width)
    product = _fused(gate_up, padded)
    assert product.shape == (rows, padded)
    assert_rounds_alike(product[:, :width], _reference(gate_up))
    assert product[:, width:].eq(0).all()


def test_large_gates_neither_overflow_nor_vanish() -> None:
    gate = torch.tensor([-1e4, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 1e4], device=DEVICE)
    gate_up = torch.cat((gate, torch.full_like(gate, 2.0))).unsqueeze(0)
    assert_rounds_alike(_fused(gate_up, 64)[:, :8], _reference(gate_up))


@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (3, 576), (2, 2048)], ids=str)
def test_fragment_order_permutes_what_natural_order_gives(shape: tuple[int, int]) -> None:
    gate_up = _normal(shape[0], 2 * shape[1], dtype=torch.bfloat16)
    padded = padded_width(shape[1]) + 64
    natural, ordered = (_fused(gate_up, padded, order) for order in (False, True))
    assert ordered.equal(to_fragment_order(natural))


def test_a_product_in_float16_is_that_in_bfloat16_kept_finite() -> None:
    gate_up = _normal(3, 200, scale=3, dtype=torch.bfloat16)
    gate_up[0, :2], gate_up[0, 100:102] = 1000.0, torch.tensor([1000.0, -1000.0], dtype=torch.bfloat16)
    for fragment_order in (False, True):
        expected = _fused(gate_up, 128, fragment_order)
        product = _fused(gate_up, 128, fragment_order, torch.float16)
        assert product.equal(expected.float().clamp(-65504, 65504).half())
        assert product.abs().max() == 65504


def test_rows_at_any_distance() -> None:
    gate_up = _normal(5, 300)
    assert_rounds_alike(_fused(gate_up[:, 33:161], 64), _reference(gate_up[:, 33:161]))


def test_no_rows() -> None:
    assert _fused(_normal(0, 128), 64).shape == (0, 64)


@pytest.mark.parametrize("arch", ARCHES)
def test_tiles_cover_the_output(arch: int) -> None:
    for tokens in (1, 2, 7, 1000):
        for width in (64, 192, 576, 1536, 12288):
            launch = silu_mul_launch(tokens, width, arch)
            assert width % launch.columns == 0
            assert 64 <= launch.rows * launch.columns <= 1024
            assert launch.rows < 2 * tokens
