"""The kernels' layout of FP8 weights: every code comes back, and the shifts it was made for unpack it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.kernels import fp8, nvfp4
from nybble.kernels.quantized_tensor import FP8, QuantizedTensor, stack
from nybble.kernels.triton.fp8_matrix import pack_fp8

# All codes but the two that are not numbers, as if they were the first columns of a block of 64.
NUMBERS = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)


def random_weight(rows: int, columns: int) -> QuantizedTensor:
    return fp8.quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)))


def every_number(num_rows: int) -> QuantizedTensor:
    """Each row begins at another code: so each stands at all places of a word."""
    codes = torch.stack([NUMBERS.roll(row) for row in range(num_rows)])
    return QuantizedTensor(codes.view(torch.float8_e4m3fn), None, torch.rand(num_rows), FP8)


@pytest.mark.parametrize("is_float16", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (40, 96), (5, 192), (130, 321), (1, 1)])
def test_inverse(rows: int, columns: int, is_float16: bool) -> None:
    weight = random_weight(rows, columns)
    matrix = pack_fp8(weight, is_float16)
    assert bits(matrix.natural_codes()).equal(bits(weight.codes))
    assert matrix.dequantize().equal(weight.dequantize())
    assert matrix.shape == weight.shape
    assert matrix.num_rows == rows and matrix.width == -(-columns // 64) * 64
    assert not pack_fp8(weight, is_float16=True).codes[:, columns:].any()


@pytest.mark.parametrize("is_float16", [False, True])
def test_every_code_comes_back(is_float16: bool) -> None:
    weight = every_number(4)
    assert bits(pack_fp8(weight, is_float16).natural_codes()).equal(bits(weight.codes))


def test_shifts_and_masks_unpack_every_code() -> None:
    """To bfloat16 2^120 times too small, the two columns of a pair in the halves of a word."""
    weight = every_number(4)
    words = pack_fp8(weight, is_float16=False).codes.view(torch.int32).long() & 0xFFFFFFFF
    rotated = (words << 8 | words >> 24) & 0xFFFFFFFF
    pairs = torch.stack([words & 0x87F087F0, words << 4 & 0x80808080 | rotated & 0x07700770], dim=-1)
    halves = torch.stack([pairs & 0xFFFF, pairs >> 16], dim=-1).flatten(1)
    values = halves.to(torch.int16).view(torch.bfloat16).float() * 2.0**120
    assert values[:, : len(NUMBERS)].equal(weight.codes.float())
    assert not values[:, len(NUMBERS) :].any()


def test_refused() -> None:
    for code in (0x7F, 0xFF):
        codes = torch.tensor([[0x38, code]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        with pytest.raises(ValueError, match="codes must be numbers"):
            pack_fp8(QuantizedTensor(codes, None, torch.ones(1), FP8), is_float16=False)
    with pytest.raises(ValueError, match=r"nvfp4 \[4, 64\] is not an FP8 matrix"):
        pack_fp8(nvfp4.quantize(torch.ones(4, 64)), is_float16=False)
    with pytest.raises(ValueError, match=r"fp8 \[2, 4, 64\] is not an FP8 matrix"):
        pack_fp8(stack([random_weight(4, 64)] * 2), is_float16=False)


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)
