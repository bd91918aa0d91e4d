from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from cpu_weights import FP4_FORMATS, random_float, random_fp4, random_fp8, random_stack
from poison import poisoned as poisoned

from nybble.kernels.cpu.cpu_matrix import Kind, dequantize, prepare, prepare_float32
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.weight_memory import WeightMemory
from nybble.kernels.quantized_tensor import MXFP4, NVFP4, NVFP4_DIVIDED, Format, QuantizedTensor, stack

SIZES = ((1, 32), (16, 64), (37, 96), (50, 160))


@pytest.mark.parametrize("format", FP4_FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_fp4_is_what_it_was(format: Format, rows: int, columns: int) -> None:
    weight = random_fp4(format, rows, columns)
    back = dequantize(prepare(weight))
    if format is NVFP4_DIVIDED:  # multiplied by the reciprocal
        assert_close(back, weight.dequantize(), max_error=1e-6, rms_error=1e-7)
    else:
        assert torch.equal(back, weight.dequantize())


def test_columns_that_are_half_a_block() -> None:
    weight = random_fp4(NVFP4, 5, 16 * 3)
    assert torch.equal(dequantize(prepare(weight)), weight.dequantize())


def test_every_code_with_every_scale() -> None:
    """E4M3 scales of both signs, subnormal ones too; NaN makes its row NaN."""
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).view(torch.float8_e4m3fn)
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).repeat(256, 1)
    weight = QuantizedTensor(codes, scales, torch.ones(256), NVFP4)
    torch.testing.assert_close(
        dequantize(prepare(weight)), weight.dequantize(), rtol=0, atol=0, equal_nan=True
    )


def test_every_power_of_two_but_the_smallest() -> None:
    """2^-127 counts as zero."""
    powers = torch.arange(256, dtype=torch.uint8).view(256, 1)
    weight = QuantizedTensor(
        torch.full((256, 16), 0xF3, dtype=torch.uint8), powers.view(torch.float8_e8m0fnu), None, MXFP4
    )
    expected = weight.dequantize().masked_fill((powers == 0), 0)
    torch.testing.assert_close(dequantize(prepare(weight))[1:], expected[1:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", FP4_FORMATS, ids=lambda format: format.name)
def test_stack(format: Format) -> None:
    weight = random_stack(format, 3, 20, 64)
    matrix = prepare(weight)
    assert (matrix.shape, matrix.num_matrices) == ((3, 20, 64), 3)
    assert_close(dequantize(matrix), weight.dequantize(), max_error=1e-6, rms_error=1e-7)


@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (3, 1), (2050, 40)])
def test_int8_is_half_a_step_away(rows: int, columns: int) -> None:
    """Of blocks of 32 columns."""
    weight = random_float(rows, columns)
    error = (dequantize(prepare(weight)) - weight).abs()
    for start in range(0, columns, 32):
        block = slice(start, start + 32)
        step = weight[:, block].abs().amax(dim=1, keepdim=True) / 127
        assert (error[:, block] <= step * 0.57).all()  # the scale's own rounding moves the largest codes


def test_int8_of_rows_and_blocks_of_zeros() -> None:
    weight = random_float(18, 96)
    weight[3] = 0
    weight[:, 32:64] = 0
    back = dequantize(prepare(weight))
    assert (back[3] == 0).all()
    assert (back[:, 32:64] == 0).all()
    assert_close(back, weight, max_error=0.03, rms_error=0.006)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_int8_row_with_a_number_that_is_not_finite(number: float) -> None:
    weight = random_float(20, 64)
    weight[7, 40] = number
    back = dequantize(prepare(weight))
    assert back[7].isnan().all()
    assert back[[6, 8]].isfinite().all()


@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (3, 1), (37, 33), (18, 2075)])
def test_fp8_is_what_it_was(rows: int, columns: int) -> None:
    weight = random_fp8(rows, columns)
    matrix = prepare(weight)
    assert matrix.kind is Kind.FP8
    assert torch.equal(dequantize(matrix), weight.dequantize())


def test_stack_of_fp8() -> None:
    weight = stack([random_fp8(20, 50, seed) for seed in range(3)])
    matrix = prepare(weight)
    assert (matrix.shape, matrix.num_matrices) == ((3, 20, 50), 3)
    assert torch.equal(dequantize(matrix), weight.dequantize())


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_row_of_fp8_with_a_code_nan_is_nan(code: int) -> None:
    weight = random_fp8(20, 64)
    weight.codes.view(torch.uint8)[7, 40] = code
    back = dequantize(prepare(weight))
    assert back[7].isnan().all()
    assert back[[6, 8]].isfinite().all()


@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (3, 1)])
def test_float_forms(rows: int, columns: int) -> None:
    weight = random_float(rows, columns)
    assert torch.equal(dequantize(prepare(weight, "bf16")), weight.bfloat16().float())
    assert torch.equal(dequantize(prepare_float32(weight)), weight)


def test_int8_of_other_floats() -> None:
    weight = random_float(21, 75)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        given = weight.to(dtype)
        assert torch.equal(dequantize(prepare(given)), dequantize(prepare(given.float())))


def test_small_scales_beside_a_large_one() -> None:
    """Where float16 has fewer bits, down to none, compared with the row's largest."""
    weight = random_float(4, 32 * 6) * torch.logspace(0, -10, 6).repeat_interleave(32)
    error = (dequantize(prepare(weight)) - weight).abs()
    assert (error <= weight.abs().amax(dim=1, keepdim=True) * 4e-3).all()
    assert (error[:, 32:64] <= weight[:, 32:64].abs().amax(dim=1, keepdim=True) * 5e-3).all()


def test_threads_of_a_pool_do_the_same(pool: Pool) -> None:
    for weight in (random_stack(NVFP4, 3, 70, 48), random_fp8(70, 50), random_float(70, 50)):
        alone, together = prepare(weight), prepare(weight, pool=pool, memory=WeightMemory())
        assert torch.equal(alone.codes, together.codes)
        assert torch.equal(alone.scales, together.scales)
        assert torch.equal(alone.row_scales, together.row_scales)


def test_bytes_of_a_weight() -> None:
    """At a size without padding, row scales included."""
    rows, columns = 64, 1024
    bits = {
        name: 8 * matrix.num_bytes / (rows * columns)
        for name, matrix in (
            ("nvfp4", prepare(random_fp4(NVFP4, rows, columns))),
            ("mxfp4", prepare(random_fp4(MXFP4, rows, columns))),
            ("fp8", prepare(random_fp8(rows, columns))),
            ("int8", prepare(random_float(rows, columns))),
            ("bf16", prepare(random_float(rows, columns), "bf16")),
        )
    }
    row = 32 / columns
    expected = {"nvfp4": 4.5 + row, "mxfp4": 4.25 + row, "fp8": 8 + row, "int8": 8.5 + row, "bf16": 16}
    assert bits == expected


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a weight is \[4\]"):
        prepare(torch.zeros(4))
    with pytest.raises(ValueError, match=r"a weight is \[0, 4\]"):
        prepare(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="a weight is on meta"):
        prepare(torch.zeros(4, 4, device="meta"))
