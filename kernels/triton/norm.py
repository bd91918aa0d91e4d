"""Adding a layer's output to the hidden states, and the norm that the next layer begins with: one launch.

Each rounds to the activation dtype where the reference does: the sum; the normed value; its product with the
weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.ops import RmsNorm
from nybble.kernels.quantized_tensor import Format, QuantizedTensor
from nybble.kernels.triton.activation_quantization import (
    empty_quantized,
    quantized_parts,
    store_quantized_row,
)
from nybble.kernels.triton.fp4 import narrow
from nybble.kernels.triton.launch import launch as launch_kernel
from nybble.kernels.triton.row import RowLaunch, in_fragment_order, load_row, store_row, widened


def residual_rms_norm(
    hidden: Tensor,
    update: Tensor | None,
    norm: RmsNorm,
    *,
    fragment_order: bool,
    padded_width: int,
    dtype: torch.dtype,
    launch: RowLaunch,
) -> tuple[Tensor, Tensor]:
    """hidden + update [T, H], which replaces `hidden`, and its norm [T, padded_width] in `dtype`.

    update: [T, H] in the activation dtype or float32, added in float32; None leaves hidden as it is.
    padded_width: a multiple of 64, for which `launch` is; columns from H on are zeros. fragment_order: see
    `activation_order`. Rows of hidden and update may lie at any distance.
    """
    normed = torch.empty(hidden.shape[0], padded_width, dtype=dtype, device=hidden.device)
    _launch_norm(hidden, update, norm, normed, None, fragment_order, launch)
    return hidden, normed


def quantized_residual_rms_norm(
    hidden: Tensor,
    update: Tensor | None,
    norm: RmsNorm,
    *,
    format: Format,
    padded_width: int,
    launch: RowLaunch,
) -> tuple[Tensor, Tensor, QuantizedTensor]:
    """As `residual_rms_norm` in natural order, and the same norm as MXFP8 or NVFP4 (ValueError for others).

    `launch` comes from `quantization_launch`, which says where that is possible.
    """
    normed = hidden.new_empty(hidden.shape[0], padded_width)
    quantized = empty_quantized(hidden.shape[0], padded_width, format, hidden.device)
    _launch_norm(hidden, update, norm, normed, quantized, False, launch)
    return hidden, normed, quantized


def _launch_norm(
    hidden: Tensor,
    update: Tensor | None,
    norm: RmsNorm,
    normed: Tensor,
    quantized: QuantizedTensor | None,
    fragment_order: bool,
    launch: RowLaunch,
) -> None:
    rows, width = hidden.shape
    launch_kernel(
        _residual_rms_norm_kernel,
        (rows,),
        hidden,
        update,
        norm.weight,
        normed,
        *((None, None, None) if quantized is None else quantized_parts(quantized)),
        hidden.stride(0),
        0 if update is None else update.stride(0),
        width,
        normed.shape[1],
        norm.eps,
        FRAGMENT_ORDER=fragment_order,
        FORMAT=None if quantized is None else quantized.format.name,
        CHUNK=launch.chunk,
        NUM_CHUNKS=launch.num_chunks,
        num_warps=launch.num_warps,
    )


@triton.jit
def _residual_rms_norm_kernel(
    hidden_ptr,
    update_ptr,
    weight_ptr,
    normed_ptr,
    codes_ptr,
    scales_ptr,
    row_scales_ptr,
    hidden_stride,
    update_stride,
    width,
    padded_width,
    eps,
    FRAGMENT_ORDER: tl.constexpr,
    FORMAT: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    hidden_ptr += row * hidden_stride
    hidden = load_row(hidden_ptr, width, CHUNK, NUM_CHUNKS)
    weight = load_row(weight_ptr, width, CHUNK, NUM_CHUNKS)
    if update_ptr is not None:
        update = load_row(update_ptr + row * update_stride, width, CHUNK, NUM_CHUNKS)
        hidden = _sum(hidden, update, NUM_CHUNKS)
        store_row(hidden, hidden_ptr, width, CHUNK, NUM_CHUNKS)
    inverse_rms = tl.rsqrt(_mean_square(hidden, width, CHUNK, NUM_CHUNKS) + eps)
    normed = tl.tuple(())
    for i in tl.static_range(NUM_CHUNKS):
        part = _normed(hidden[i], inverse_rms, weight[i])
        normed += (part,)
        part = narrow(part.to(tl.float32), normed_ptr)
        part = in_fragment_order(part) if FRAGMENT_ORDER else part
        columns = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(normed_ptr + row * padded_width + columns, part, mask=columns < padded_width)
    if FORMAT is not None:
        wide, places = widened(normed, NUM_CHUNKS), (codes_ptr, scales_ptr, row_scales_ptr)
        store_quantized_row(wide, row, padded_width, places, FORMAT, CHUNK, NUM_CHUNKS)


@triton.jit
def _sum(hidden, update, NUM_CHUNKS: tl.constexpr):
    total = tl.tuple(())
    for i in tl.static_range(NUM_CHUNKS):
        total += ((hidden[i].to(tl.float32) + update[i].to(tl.float32)).to(hidden[i].dtype),)
    return total


@triton.jit
def _mean_square(hidden, width, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr):
    squares = tl.zeros((CHUNK,), tl.float32)
    for i in tl.static_range(NUM_CHUNKS):
        wide = hidden[i].to(tl.float32)
        squares += wide * wide
    return tl.sum(squares, 0) / width


@triton.jit
def _normed(hidden, inverse_rms, weight):
    rounded = (hidden.to(tl.float32) * inverse_rms).to(hidden.dtype)
    return (rounded.to(tl.float32) * weight.to(tl.float32)).to(hidden.dtype)
