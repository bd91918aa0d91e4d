"""Bit for bit against `nvfp4` row by row, and against MXFP8 written again with torch's casts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels import nvfp4
from nybble.kernels.quantized_tensor import FP8, MXFP4, NVFP4, Format, QuantizedTensor, concatenate_rows
from nybble.kernels.triton.activation_order import to_fragment_order
from nybble.kernels.triton.activation_quantization import MXFP8, quantization_launch, quantize_activations

CONVERTING = [arch for arch in ARCHES if arch >= 90]
needs_conversion = pytest.mark.skipif(not CONVERTING, reason="a GPU with no conversion to E4M3")


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def _quantized(x: Tensor, format: Format, fragment_order: bool = False) -> QuantizedTensor:
    launch = quantization_launch(x.shape[1], CONVERTING[0])
    return quantize_activations(x, format, fragment_order=fragment_order, launch=launch)


def _mxfp8(x: Tensor) -> QuantizedTensor:
    """The exponents by frexp, which splits x into a mantissa of at least one half and a power of two."""
    blocks = x.double().unflatten(-1, (-1, 32))
    exponents = (torch.frexp(blocks.abs().amax(dim=-1)).exponent - 1 - 8).clamp(min=-127)
    exponents = exponents.masked_fill((blocks == 0).all(dim=-1), -127)
    quotients = (blocks * torch.exp2(-exponents.double()).unsqueeze(-1)).clamp(-448, 448)
    codes = quotients.float().to(torch.float8_e4m3fn).flatten(-2)
    scales = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return QuantizedTensor(codes, scales, None, MXFP8)


def _expected(x: Tensor, format: Format) -> QuantizedTensor:
    if format == MXFP8:
        return _mxfp8(x)
    return concatenate_rows([nvfp4.quantize(row) for row in x.split(1)])


def _assert_same_bits(actual: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert actual.format == expected.format
    for name in ("codes", "block_scales"):
        one, other = getattr(actual, name).view(torch.uint8), getattr(expected, name).view(torch.uint8)
        assert one.equal(other), f"{(one != other).sum()} of {one.numel()} {name} differ"
    if expected.global_scales is not None:
        assert actual.global_scales is not None and actual.global_scales.equal(expected.global_scales)


@needs_conversion
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [MXFP8, NVFP4], ids=lambda format: format.name)
@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (2, 1536), (1, 5120), (3, 2080), (0, 64)], ids=str)
def test_quantized_as_the_reference_does(shape: tuple[int, int], format: Format, dtype: torch.dtype) -> None:
    x = _normal(*shape, dtype=dtype) * 3
    if len(x):
        _assert_same_bits(_quantized(x, format), _expected(x, format))
    else:
        assert _quantized(x, format).shape == shape


@needs_conversion
@pytest.mark.parametrize("format", [MXFP8, NVFP4], ids=lambda format: format.name)
def test_odd_numbers(format: Format) -> None:
    """Ties and their neighbours, zeros of both signs, rows of zeros, and sizes far apart in a row."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], device=DEVICE)
    around = torch.stack((ties, ties * (1 + 2.0**-23), ties * (1 - 2.0**-24), -ties)).flatten()
    x = torch.zeros(6, 128, device=DEVICE)
    x[0, :32], x[0, 32:64] = around, around * 448  # a global scale of 1, and block scales of 1 and 448
    x[1, :64:2], x[1, 1:64:2] = around, -0.0
    x[2] = -0.0
    x[3] = torch.logspace(-20, 4, 128, device=DEVICE)
    x[4] = torch.logspace(-8, 3, 128, base=2, device=DEVICE) * (1 - 2.0**-8)
    # Block scales of one or two of E4M3's smallest, below what the block has: quotients up to 8 saturate.
    x[5, 0], x[5, 16:32], x[5, 32:48] = 6 * 448, 6 * 1.49 * 2**-9, 6 * 2.49 * 2**-9
    _assert_same_bits(_quantized(x, format), _expected(x, format))


@needs_conversion
def test_quotients_are_rounded_as_division_is() -> None:
    """Rows of one block each, with the largest value at random, and the others where codes change."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=DEVICE)
    largest = _normal(64, 1).abs() + 0.01
    rows = torch.cat((largest, largest / 6 * ties, -largest / 6 * ties, largest * 0), dim=1)  # [64, 16]
    ulps = torch.randint(-2, 3, rows.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = (rows.view(torch.int32) + ulps.int() * (rows != 0)).view(torch.float32)
    _assert_same_bits(_quantized(x, NVFP4), _expected(x, NVFP4))


@needs_conversion
@pytest.mark.parametrize("format", [MXFP8, NVFP4], ids=lambda format: format.name)
@pytest.mark.parametrize("width", [64, 576, 1536])
def test_fragment_order_is_undone(width: int, format: Format) -> None:
    x = _normal(2, width, dtype=torch.bfloat16)
    ordered = F.pad(to_fragment_order(x), (0, 64), value=torch.nan)[:, :width]
    _assert_same_bits(_quantized(ordered, format, fragment_order=True), _expected(x, format))


@needs_conversion
def test_rows_at_any_distance() -> None:
    x = _normal(3, 192)
    for format in (MXFP8, NVFP4):
        _assert_same_bits(_quantized(x[:, 64:128], format), _expected(x[:, 64:128], format))


@needs_conversion
def test_nvfp4_of_rows_that_nearly_vanish_is_finite() -> None:
    x = _normal(4, 64) * torch.tensor([1e-26, 1e-30, 1e-38, 1e-44], device=DEVICE)[:, None]
    dequantized = _quantized(x, NVFP4).dequantize()
    error = (dequantized - x).abs().amax(1) / x.abs().amax(1)
    assert (error[:2] < 0.2).all()
    assert dequantized[2:].eq(0).all()


@needs_conversion
def test_mxfp8_saturates_between_448_and_512() -> None:
    x = torch.full((1, 32), 511.0, device=DEVICE)
    quantized = _quantized(x, MXFP8)
    assert (quantized.dequantize() == 448).all()


@needs_conversion
@pytest.mark.parametrize("format", [MXFP8, NVFP4], ids=lambda format: format.name)
def test_nan_is_not_hidden(format: Format) -> None:
    x = _normal(2, 64)
    x[0, 5] = torch.nan
    dequantized = _quantized(x, format).dequantize()
    assert dequantized[0, 5].isnan()
    assert dequantized[1].isfinite().all()


@needs_conversion
@pytest.mark.parametrize(("format", "bound"), [(MXFP8, 0.035), (NVFP4, 0.11)], ids=["mxfp8", "nvfp4"])
def test_error(format: Format, bound: float) -> None:
    x = _normal(4, 512)
    error = _quantized(x, format).dequantize() - x
    assert error.square().mean().sqrt() < bound


@needs_conversion
def test_padding_costs_nothing() -> None:
    """Zeros beside a row change neither its codes nor its scales."""
    x = _normal(2, 96)
    plain, padded = _quantized(x, NVFP4), _quantized(F.pad(x, (0, 32)), NVFP4)
    assert padded.codes[:, :48].equal(plain.codes)
    assert padded.dequantize()[:, 96:].eq(0).all()


def test_what_cannot_be_quantized_is_refused() -> None:
    launch = quantization_launch(64, 100)
    for format in (MXFP4, FP8):
        with pytest.raises(ValueError, match="activations are quantized to mxfp8 or nvfp4"):
            quantize_activations(_normal(1, 64), format, fragment_order=False, launch=launch)
    with pytest.raises(ValueError, match="multiple of the mxfp8 block size"):
        quantize_activations(_normal(1, 48), MXFP8, fragment_order=False, launch=launch)
    with pytest.raises(ValueError, match="no conversion to E4M3"):
        quantization_launch(64, 80)
