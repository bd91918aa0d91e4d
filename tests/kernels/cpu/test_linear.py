from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from cpu_weights import as_words, every_kind, generator_of, random_float, random_fp4, random_fp8, takes_floats
from guarded_memory import guarded as guarded

from nybble.kernels.cpu.cpu_matrix import dequantize, prepare
from nybble.kernels.cpu.linear import linear
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.quantized_tensor import FP8, NVFP4, QuantizedTensor

SIZES = ((1, 16), (16, 32), (17, 48), (37, 33), (96, 576), (130, 1040))
NUM_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 31)


def normal(num_tokens: int, columns: int) -> torch.Tensor:
    return torch.randn((num_tokens, columns), generator=generator_of(num_tokens, columns))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_equals_float64(pool: Pool, rows: int, columns: int, guarded: None) -> None:
    """Of what weights and int8 activations stand for: only float32 sums differ."""
    for name, matrix in every_kind(rows, columns).items():
        weights = dequantize(matrix).double()
        for num_tokens in NUM_TOKENS:
            x = normal(num_tokens, columns)
            taken = x.double() if takes_floats(matrix) else as_words(x)
            exact, scale = taken @ weights.T, taken.abs() @ weights.abs().T
            error = (linear(pool, x, matrix).double() - exact).abs()
            assert (error <= 2e-6 * scale).all(), (name, num_tokens)


def test_close_to_the_product_with_activations_as_they_are(pool: Pool) -> None:
    with_outliers = normal(16, 1536)
    with_outliers[:, ::97] *= 20
    for matrix in every_kind(192, 1536).values():
        bound = 1e-5 if takes_floats(matrix) else 8e-3
        for x in (normal(16, 1536), with_outliers):
            expected = x.double() @ dequantize(matrix).double().T
            assert_close(linear(pool, x, matrix), expected, max_error=6 * bound, rms_error=bound)


def test_int8_weights_close_to_those_they_were_made_of(pool: Pool) -> None:
    x, weight = normal(16, 1536), random_float(192, 1536)
    expected = x.double() @ weight.double().T
    assert_close(linear(pool, x, prepare(weight)), expected, max_error=0.04, rms_error=8e-3)


def every_fp8_code(columns: int) -> QuantizedTensor:
    """[254, columns]: each finite code in every column."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F < 0x7F], dtype=torch.uint8)
    shifted = torch.stack([codes.roll(7 * column) for column in range(columns)], dim=1)
    row_scales = 0.1 + torch.rand(len(codes), generator=generator_of(columns))
    return QuantizedTensor(shifted.view(torch.float8_e4m3fn), None, row_scales, FP8)


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 70])
def test_every_fp8_code_has_its_value(pool: Pool, num_tokens: int) -> None:
    """One column at a time: scaled once, nothing else rounds."""
    weight = every_fp8_code(70)
    matrix, expected = prepare(weight), weight.dequantize().T
    for rows in torch.eye(70).split(num_tokens):
        assert torch.equal(linear(pool, rows, matrix), rows @ expected)


def test_fp8_equals_float64(pool: Pool) -> None:
    weight, x = every_fp8_code(1041), normal(9, 1041)
    expected = x.double() @ weight.dequantize(torch.float64).T
    assert_close(linear(pool, x, prepare(weight)), expected, max_error=1e-5, rms_error=1e-6)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_code_nan(pool: Pool, code: int) -> None:
    """NaN, even times zero, in its row only."""
    weight = random_fp8(37, 50)
    expected = linear(pool, torch.zeros(3, 50), prepare(weight))
    weight.codes.view(torch.uint8)[20, 49] = code
    result = linear(pool, torch.zeros(3, 50), prepare(weight))
    assert result[:, 20].isnan().all()
    expected[:, 20] = torch.nan
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_a_row_does_not_depend_on_others_or_on_threads(pool: Pool) -> None:
    x = normal(77, 576)
    for matrix in every_kind(100, 576).values():
        together = linear(pool, x, matrix)
        for first, after in ((0, 1), (1, 3), (3, 10), (10, 77)):
            assert torch.equal(linear(pool, x[first:after], matrix), together[first:after])
        with Pool(1, pool.level) as one_thread:
            assert torch.equal(linear(one_thread, x, matrix), together)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(pool: Pool, number: float) -> None:
    x = normal(5, 96)
    for matrix in every_kind(40, 96).values():
        expected = linear(pool, x, matrix)
        broken = x.clone()
        broken[2, 50] = number
        result = linear(pool, broken, matrix)
        assert not result[2].isfinite().any()
        assert torch.equal(result[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_activations_of_every_size(pool: Pool) -> None:
    """From numbers whose square is no float32 to the largest; rows and blocks of zeros."""
    x = normal(6, 64) * torch.tensor([1e-38, 1e-25, 1.0, 1e20, 1e30, 0.0]).unsqueeze(1)
    x[2, 32:] = 0
    matrix = prepare(random_fp4(NVFP4, 33, 64))
    result, expected = linear(pool, x, matrix), x.double() @ dequantize(matrix).double().T
    for row in (1, 2, 3, 4):
        assert_close(result[row], expected[row], max_error=0.05, rms_error=0.015)
    assert (result[[0, 5]] == 0).all()  # magnitudes below 1e-30 count as zero


def test_no_tokens(pool: Pool) -> None:
    assert linear(pool, torch.zeros(0, 64), prepare(random_float(20, 64))).shape == (0, 20)


def test_what_does_not_fit_is_named(pool: Pool) -> None:
    matrix = prepare(random_float(20, 64))
    with pytest.raises(ValueError, match=r"x is .* \[3, 65\]"):
        linear(pool, torch.zeros(3, 65), matrix)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16"):
        linear(pool, torch.zeros(3, 64, dtype=torch.bfloat16), matrix)
    with pytest.raises(ValueError, match=r"takes a matrix \[N, K\], not \[2, 20, 64\]"):
        linear(pool, torch.zeros(3, 64), prepare(torch.zeros(2, 20, 64)))
