"""Activations for matrix instructions with block scales (sm_100 and sm_120): MXFP8 and NVFP4.

    MXFP8    E4M3 codes; a block of 32 columns shares a power of two (E8M0), 2^(floor(log2 P) - 8), with P
             its largest magnitude. Quotients lie below 512; above 448 they saturate (OCP Microscaling)
    NVFP4    as `nvfp4` quantizes a matrix, byte for byte, but with a global scale for each row: that is 1 if
             the row is zeros, else at least 2^-100, so that nothing vanishes on the way

Codes are in natural order. The device functions take a row from registers, so that the kernel that makes an
activation can quantize it as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.quantized_tensor import E2M1_MAX, E4M3_MAX, NVFP4, Format, QuantizedTensor
from nybble.kernels.triton.launch import launch as launch_kernel
from nybble.kernels.triton.row import RowLaunch, load_fragment_row, load_row, row_launch, widened

MXFP8 = Format("mxfp8", 8, 32, torch.float8_e8m0fnu, has_global_scale=False)

_ROW_MAX = tl.constexpr(E2M1_MAX * E4M3_MAX)
_E4M3_MIN = tl.constexpr(2.0**-9)
_E2M1_MAX = tl.constexpr(E2M1_MAX)
_LEAST_ROW_SCALE = tl.constexpr(2.0**-100)


def quantization_launch(width: int, arch: int) -> RowLaunch:
    """For rows of `width`. Raises ValueError below sm_90, which cannot convert to E4M3."""
    if arch < 90:
        raise ValueError(f"sm_{arch} cannot quantize activations: it has no conversion to E4M3")
    return row_launch(width, arch)


def quantize_activations(
    x: Tensor, format: Format, *, fragment_order: bool, launch: RowLaunch
) -> QuantizedTensor:
    """x [T, K], in any float dtype, its rows at any distance, as MXFP8 or NVFP4 in natural order.

    fragment_order: whether x is in that order. K is a multiple of the format's block size (ValueError), and
    with fragment order of 64.
    """
    rows, width = x.shape
    quantized = empty_quantized(rows, width, format, x.device)
    launch_kernel(
        _quantization_kernel,
        (rows,),
        x,
        *quantized_parts(quantized),
        x.stride(0),
        width,
        FRAGMENT_ORDER=fragment_order,
        FORMAT=format.name,
        CHUNK=launch.chunk,
        NUM_CHUNKS=launch.num_chunks,
        num_warps=launch.num_warps,
    )
    return quantized


def empty_quantized(rows: int, width: int, format: Format, device: torch.device) -> QuantizedTensor:
    """Uninitialised, [rows, width]. Raises ValueError for formats of weights only, and as QuantizedTensor."""
    if format not in (MXFP8, NVFP4):
        raise ValueError(f"activations are quantized to {MXFP8.name} or {NVFP4.name}, not to {format.name}")
    assert format.block_size
    return QuantizedTensor(
        codes=torch.empty(rows, width // format.codes_per_item, dtype=format.code_dtype, device=device),
        block_scales=torch.empty(rows, width // format.block_size, dtype=format.scale_dtype, device=device),
        global_scales=torch.empty(rows, device=device) if format.has_global_scale else None,
        format=format,
    )


def quantized_parts(quantized: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, block scales and global scales for a kernel, the first two as uint8: Triton has no E8M0."""
    assert quantized.block_scales is not None
    codes, scales = quantized.codes.view(torch.uint8), quantized.block_scales.view(torch.uint8)
    return codes, scales, quantized.global_scales


@triton.jit
def _quantization_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    row_scales_ptr,
    x_stride,
    width,
    FRAGMENT_ORDER: tl.constexpr,
    FORMAT: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    if FRAGMENT_ORDER:
        x = load_fragment_row(x_ptr, width, CHUNK, NUM_CHUNKS)
    else:
        x = load_row(x_ptr, width, CHUNK, NUM_CHUNKS)
    places = codes_ptr, scales_ptr, row_scales_ptr
    store_quantized_row(widened(x, NUM_CHUNKS), row, width, places, FORMAT, CHUNK, NUM_CHUNKS)


@triton.jit
def store_quantized_row(
    x, row, width, places, FORMAT: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr
):
    """Quantize x, a row in float32, and store it as number `row`, an int64, of matrices without gaps.

    places: pointers to codes, block scales and, for NVFP4, global scales.
    """
    if FORMAT == "nvfp4":
        row_scale = _row_scale(x, CHUNK, NUM_CHUNKS)
        tl.store(places[2] + row, row_scale)
        for i in tl.static_range(NUM_CHUNKS):
            codes, scales = _nvfp4(tl.reshape(x[i], (CHUNK // 16, 16)), row_scale)
            _store_chunk(codes, places[0] + row * (width // 2), i, width // 2, CHUNK // 2)
            _store_chunk(scales, places[1] + row * (width // 16), i, width // 16, CHUNK // 16)
    else:
        for i in tl.static_range(NUM_CHUNKS):
            codes, scales = _mxfp8(tl.reshape(x[i], (CHUNK // 32, 32)))
            _store_chunk(codes, places[0] + row * width, i, width, CHUNK)
            _store_chunk(scales, places[1] + row * (width // 32), i, width // 32, CHUNK // 32)


@triton.jit
def _store_chunk(items, row_ptr, i, num_items, CHUNK: tl.constexpr):
    columns = i * CHUNK + tl.arange(0, CHUNK)
    tl.store(row_ptr + columns, tl.reshape(items, (CHUNK,)), mask=columns < num_items)


@triton.jit
def _mxfp8(x):
    """x float32 [BLOCKS, 32] as codes uint8 [BLOCKS, 32] (E4M3) and scales uint8 [BLOCKS] (E8M0)."""
    exponents = tl.maximum((tl.max(_magnitude_bits(x), 1) >> 23) - 8, 0)
    inverses = ((254 - exponents) << 23).to(tl.float32, bitcast=True)
    return e4m3_bits(x * inverses[:, None]), exponents.to(tl.uint8)


@triton.jit
def _row_scale(x, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr):
    """NVFP4's global scale of a row."""
    bits = tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(NUM_CHUNKS):
        bits = tl.maximum(bits, _magnitude_bits(x[i]))
    largest = tl.max(bits, 0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, _ROW_MAX)
    # Comparisons that NaN fails, so that it is stored.
    return tl.where(largest == 0, 1.0, tl.where(scale < _LEAST_ROW_SCALE, _LEAST_ROW_SCALE, scale))


@triton.jit
def _nvfp4(x, row_scale):
    """x float32 [BLOCKS, 16] with its row's global scale, as codes uint8 [BLOCKS, 8] (pairs of E2M1, the even
    column low) and scales uint8 [BLOCKS] (E4M3)."""
    largest = tl.max(_magnitude_bits(x), 1).to(tl.float32, bitcast=True)
    unit = _E2M1_MAX * row_scale
    scales = _quotients(largest, unit, tl.div_rn(1.0, unit))
    scales = tl.where(scales == 0, 1.0, tl.maximum(scales, _E4M3_MIN)).to(tl.float8e4nv)
    divisors = scales.to(tl.float32) * row_scale
    codes = _e2m1_codes(_quotients(x, divisors[:, None], tl.div_rn(1.0, divisors)[:, None]))
    low, high = tl.split(tl.reshape(codes, (x.shape[0], 8, 2)))
    return (low | (high << 4)).to(tl.uint8), scales.to(tl.uint8, bitcast=True)


@triton.jit
def _quotients(x, divisors, inverses):
    """x / divisors, in three instructions where a division has some thirty.

    A product with the inverse, corrected once, is off by 2^-24 units in the last place before it is rounded.
    Only divisors that are a few units from certain simple fractions bring a quotient that near to where
    another rounding would change a code of E2M1 or E4M3; those were compared with exact division.
    """
    products = x * inverses
    return tl.fma(tl.fma(-products, divisors, x), inverses, products)


@triton.jit
def e4m3_bits(x):
    """x, float32 of any shape, as E4M3 in uint8: the instruction that converts saturates at 448."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _magnitude_bits(x):
    """int32 that are ordered as |x| is, NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _e2m1_codes(x):
    """int32 codes of the E2M1 values nearest to x, float32 of any shape, as `nearest_codes` has them.

    Added to 2^22 times the power of two below it (at least 1), a magnitude leaves itself in the last bits of
    the sum, in steps of E2M1 and rounded to even. The step doubles at 2 and at 4, where codes 4 and 6 begin.
    """
    magnitude = tl.minimum(tl.abs(x), _E2M1_MAX)
    power = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 127 << 23)
    adder = power + (22 << 23)
    steps = (magnitude + adder.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - adder
    return (steps + (power >> 22) - 254) | tl.where(x < 0, 8, 0)
