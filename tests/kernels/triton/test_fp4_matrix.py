"""The kernels' weight layout: every code and scale comes back, and nothing is rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble.kernels import mxfp4, nvfp4
from nybble.kernels.quantized_tensor import FP8, NVFP4_DIVIDED, QuantizedTensor, stack
from nybble.kernels.triton.fp4_matrix import pack_fp4

QUANTIZE = {"nvfp4": nvfp4.quantize, "mxfp4": mxfp4.quantize}
SHAPES = [(16, 64), (48, 128), (40, 96), (5, 192), (130, 320)]


def random_weight(format_name: str, rows: int, columns: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    return QUANTIZE[format_name](weight * torch.rand(rows, 1, generator=generator) ** 4)


@pytest.mark.parametrize("is_float16", [False, True])
@pytest.mark.parametrize("format_name", QUANTIZE)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_inverse(rows: int, columns: int, format_name: str, is_float16: bool) -> None:
    weight = random_weight(format_name, rows, columns)
    matrix = pack_fp4(weight, is_float16)
    assert torch.equal(matrix.natural_codes(), weight.codes)
    assert torch.equal(matrix.scales(), weight.scales())
    assert matrix.shape == weight.shape
    assert matrix.width == -(-columns // 64) * 64


@pytest.mark.parametrize("is_float16", [False, True])
@pytest.mark.parametrize("format_name", QUANTIZE)
def test_stack(format_name: str, is_float16: bool) -> None:
    weights = [random_weight(format_name, 24, 128), random_weight(format_name, 24, 128 + 0)]
    matrix = pack_fp4(stack(weights), is_float16)
    for index, weight in enumerate(weights):
        alone = pack_fp4(weight, is_float16)
        assert torch.equal(matrix[index].codes, alone.codes)
        assert torch.equal(matrix[index].scale_words, alone.scale_words)
        assert torch.equal(matrix.dequantize()[index], weight.dequantize())


@pytest.mark.parametrize("is_float16", [False, True])
def test_every_code_with_every_nvfp4_scale(is_float16: bool) -> None:
    """All 127 scales from 0 to 448 with all 16 codes: exact, also as products in the 16-bit float."""
    scale_bytes = torch.arange(127, dtype=torch.uint8)
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
    weight = QuantizedTensor(
        codes=codes.repeat(127, 4),
        block_scales=scale_bytes.view(torch.float8_e4m3fn).unsqueeze(1).expand(127, 4).contiguous(),
        global_scales=torch.full((127,), 0.125),
        format=nvfp4.NVFP4,
    )
    matrix = pack_fp4(weight, is_float16)
    assert torch.equal(matrix.scales()[1:], weight.scales()[1:])  # the first is zero: see below
    assert torch.equal(matrix.dequantize(), weight.dequantize())
    dtype = torch.float16 if is_float16 else torch.bfloat16
    products = matrix.dequantize() / matrix.row_scales.unsqueeze(-1)
    assert torch.equal(products, products.to(dtype).float())


@pytest.mark.parametrize("is_float16", [False, True])
def test_mxfp4_scales_beyond_what_a_byte_holds(is_float16: bool) -> None:
    """Rows from 2^-120 to 2^100: exact where a row spans less than 2^24, else its smallest scales vanish."""
    exponents = torch.tensor([[7, 9], [127, 120], [129, 135], [200, 227], [110, 133]], dtype=torch.uint8)
    codes = torch.full((5, 32), 0x72, dtype=torch.uint8)
    weight = QuantizedTensor(codes, exponents.view(torch.float8_e8m0fnu), None, mxfp4.MXFP4)
    scales = pack_fp4(weight, is_float16).scales()
    wanted = weight.scales()
    if is_float16:
        assert torch.equal(scales[:3], wanted[:3])
    else:
        assert torch.equal(scales, wanted)
    assert torch.equal(scales[:, 1:], wanted[:, 1:])
    assert (scales - wanted).abs().max() <= wanted.max() * 2.0**-23


def test_divided_global_scale() -> None:
    weight = random_weight("nvfp4", 16, 64)
    divided = replace(weight, global_scales=1 / weight.global_scales, format=NVFP4_DIVIDED)
    matrix = pack_fp4(divided, is_float16=False)
    torch.testing.assert_close(matrix.dequantize(), divided.dequantize(), rtol=2e-7, atol=0)


def test_codes_of_a_zero_scale_are_cleared() -> None:
    """No byte stands for zero in bfloat16."""
    weight = random_weight("nvfp4", 16, 64)
    scales = weight.block_scales.clone()
    scales[3, 2] = 0
    matrix = pack_fp4(replace(weight, block_scales=scales), is_float16=False)
    assert not matrix.natural_codes()[3, 16:24].any()
    assert not matrix.dequantize()[3, 32:48].any()


def test_refused() -> None:
    weight = random_weight("nvfp4", 16, 64)
    for bad in (-1.0, float("nan")):
        scales = weight.block_scales.float()
        scales[0, 0] = bad
        with pytest.raises(ValueError, match="numbers and not negative"):
            pack_fp4(replace(weight, block_scales=scales.to(torch.float8_e4m3fn)), is_float16=False)
    codes = torch.zeros(4, 64, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="fp8 is not a four-bit format"):
        pack_fp4(QuantizedTensor(codes, None, torch.ones(4), FP8), is_float16=False)
