from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.kernels import nvfp4
from nybble.kernels.quantized_tensor import E2M1_VALUES, nearest_codes

# Golden vector of the NVFP4 recipe: 32 bf16 values, as packed by compressed-tensors 0.20.
_FIRST_BLOCK = [0, 0.01, -0.01, 0.05, -0.1, 0.2, 0.3, -0.45, 0.6, 0.75, -0.9, 1, -1.2, 1.5, -2, 3]
GOLDEN = torch.tensor([[*_FIRST_BLOCK, *((i - 8) * 0.001 for i in range(16))]]).bfloat16()


def test_golden_vector() -> None:
    quantized = nvfp4.quantize(GOLDEN)
    assert quantized.codes.numpy().tobytes().hex() == "000818a1324c5c7effeecd9b10436576"
    assert quantized.block_scales.view(torch.uint8).tolist() == [[0x7E, 0x3A]]
    assert quantized.global_scales.view(torch.int32).tolist() == [0x3A924925]


def test_golden_dequantized() -> None:
    second_block = nvfp4.quantize(GOLDEN).dequantize()[0, 16:21]
    expected = [-0.008370535, -0.008370535, -0.005580357, -0.005580357, -0.004185268]
    torch.testing.assert_close(second_block, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6), (5.01, 7), (9.0, 7)],
)
def test_ties_go_to_the_even_code(value: float, code: int) -> None:
    values = torch.tensor([value, -value])
    assert nearest_codes(values).tolist() == [code, code | 8]


def test_signed_zero() -> None:
    codes = nearest_codes(torch.tensor([0.0, -0.0, -1e-9]))
    assert codes.tolist() == [0, 0, 8]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e3))
def test_nearest_of_all_codes(seed: int, magnitude: float) -> None:
    """Against exhaustive search: no other code of the block's scale is closer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 48, generator=generator) * magnitude
    quantized = nvfp4.quantize(weight)
    scales = quantized.block_scales.double() * quantized.global_scales.double()[:, None]
    grid = torch.tensor(E2M1_VALUES, dtype=torch.float64) * scales.repeat_interleave(16, 1)[..., None]
    best = (grid - weight.double()[..., None]).abs().amin(dim=-1)
    error = (quantized.dequantize(torch.float64) - weight).abs()
    assert (error <= best + 1e-6 * weight.abs().amax()).all()


def test_gaussian_error_matches_the_format() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    error = (nvfp4.quantize(weight).dequantize() - weight).square().mean().sqrt() / weight.std()
    assert 0.09 < error < 0.10  # 9.5 % is what NVFP4 costs on Gaussian weights


def test_zero_matrix_stays_zero() -> None:
    assert (nvfp4.quantize(torch.zeros(2, 32)).dequantize() == 0).all()


def test_shared_scale_covers_both() -> None:
    gate, up = torch.full((1, 16), 0.1), torch.full((1, 16), 0.4)
    scale = nvfp4.global_scale(gate, up)
    assert scale == nvfp4.global_scale(up)
    assert nvfp4.quantize(gate, scale).global_scales == scale
