"""FP4 matmuls whose operands both go to block-scaled matrix instructions, as sm_100 and sm_120 have them.

Weights are in natural order (`Fp4Matrix.is_float16`); activations are quantized: to NVFP4 for NVFP4 weights,
to MXFP8 for MXFP4 weights (sm_100 only: sm_120 has no instruction for that pair that Triton uses). That is
less exact than unpacking weights, and several times faster where arithmetic is the limit: for many tokens.

Weights are the left operand, of which sm_100 takes 128 rows at a time, tokens the right one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.quantized_tensor import NVFP4, Format, QuantizedTensor
from nybble.kernels.triton.activation_quantization import MXFP8, quantized_parts
from nybble.kernels.triton.expert_schedule import ExpertSchedule
from nybble.kernels.triton.fp4 import narrow, scale_offset
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.launch import launch as start

_WIDTH = 256  # columns that a program takes at a time: one word of scales


@dataclass(frozen=True)
class NativeFp4Launch:
    """block_rows by block_tokens of the output a program."""

    block_rows: int
    block_tokens: int
    num_warps: int
    num_stages: int


def activation_format(block_size: int, width: int, arch: int) -> Format | None:
    """What activations are quantized to for a weight of `width` columns; None if there is no instruction for
    it."""
    if arch < 100:
        return None
    if block_size == 16:
        return NVFP4
    return MXFP8 if arch == 100 and width % 128 == 0 else None  # their scales are read four at a time


def native_fp4_launch(num_tokens: int, block_size: int, arch: int) -> NativeFp4Launch:
    """For num_tokens tokens (of an expert, on average) by weights with this block size."""
    if num_tokens <= 16:
        return NativeFp4Launch(128, 16, 4, 3)
    if num_tokens <= 32:
        return NativeFp4Launch(128, 32, 4, 3)
    return NativeFp4Launch(128, 64, 8 if arch == 120 else 4, 3)


def native_linear(
    x: QuantizedTensor, weight: Fp4Matrix, out_dtype: torch.dtype, *, launch: NativeFp4Launch
) -> Tensor:
    """out_dtype [T, N] of x [T, K'], in natural order, its columns padded as the weight's are."""
    num_tokens = x.shape[0]
    y = torch.empty(num_tokens, weight.num_rows, dtype=out_dtype, device=x.codes.device)
    start(
        _native_linear_kernel,
        (triton.cdiv(weight.num_rows, launch.block_rows), triton.cdiv(num_tokens, launch.block_tokens)),
        *(y, *_activation_arguments(x), *_weight_arguments(weight)),
        *(num_tokens, weight.num_rows, weight.width),
        **_constants(weight, x, launch),
    )
    return y


def native_gate_up(
    x: QuantizedTensor,
    schedule: ExpertSchedule,
    top_k: int,
    gate_up: Fp4Matrix,
    out_dtype: torch.dtype,
    *,
    launch: NativeFp4Launch,
) -> Tensor:
    """out_dtype [T * top_k, I']: silu(gate) * up of each pair, in natural order; see `grouped_gate_up`."""
    num_pairs, intermediate = x.shape[0] * top_k, gate_up.num_rows // 2
    padded = -(-intermediate // 64) * 64
    y = torch.empty(num_pairs, padded, dtype=out_dtype, device=x.codes.device)
    start(
        _native_gate_up_kernel,
        (triton.cdiv(2 * padded, launch.block_rows), len(schedule.tile_experts)),
        *(y, schedule.sorted_slots, schedule.tile_experts, schedule.num_tiles),
        *(*_activation_arguments(x), *_weight_arguments(gate_up)),
        *(
            gate_up.codes.stride(0),
            gate_up.scale_words.stride(0),
            num_pairs,
            intermediate,
            padded,
            gate_up.width,
        ),
        TOP_K=top_k,
        **_constants(gate_up, x, launch),
    )
    return y


def native_down(
    x: QuantizedTensor, schedule: ExpertSchedule, weights: Tensor, down: Fp4Matrix, *, launch: NativeFp4Launch
) -> Tensor:
    """float32 [T, top_k, N]: each pair's product, times its route weight; see `grouped_down`."""
    num_pairs = weights.numel()
    make = torch.zeros if schedule.is_partial else torch.empty
    y = make(*weights.shape, down.num_rows, dtype=torch.float32, device=x.codes.device)
    start(
        _native_down_kernel,
        (triton.cdiv(down.num_rows, launch.block_rows), len(schedule.tile_experts)),
        *(y, weights, schedule.sorted_slots, schedule.tile_experts, schedule.num_tiles),
        *(*_activation_arguments(x), *_weight_arguments(down)),
        *(down.codes.stride(0), down.scale_words.stride(0), num_pairs, down.num_rows, down.width),
        **_constants(down, x, launch),
    )
    return y


def _activation_arguments(x: QuantizedTensor) -> tuple[object, ...]:
    codes, scales, row_scales = quantized_parts(x)
    scale_words = scales.view(torch.int32)
    return codes, scale_words, row_scales, codes.shape[1], scale_words.shape[1]


def _weight_arguments(weight: Fp4Matrix) -> tuple[object, ...]:
    return (
        weight.codes,
        weight.scale_words,
        weight.row_scales,
        weight.width // 2,
        weight.scale_words.stride(-3),
    )


def _constants(weight: Fp4Matrix, x: QuantizedTensor, launch: NativeFp4Launch) -> dict[str, object]:
    return {
        "ROWS": launch.block_rows,
        "TOKENS": launch.block_tokens,
        "WIDTH": _WIDTH,
        "BLOCK_SIZE": weight.block_size,
        "EVEN": weight.width % _WIDTH == 0,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


@triton.jit
def _native_linear_kernel(
    y_ptr, x_ptr, x_scale_ptr, x_row_scale_ptr, x_stride, x_scale_stride,
    code_ptr, scale_ptr, row_scale_ptr, code_stride, scale_stride, num_tokens, num_rows, width,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, EVEN:
    tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(row, num_rows - 1)
    sums = _native_product(
        x_ptr, x_scale_ptr, token, token < num_tokens, x_stride, x_scale_stride,
        code_ptr, read * code_stride, scale_ptr, scale_offset(read, scale_stride, BLOCK_SIZE),
        width, ROWS, TOKENS, WIDTH, BLOCK_SIZE, EVEN,
    )  # fmt: skip
    sums = _rescaled(sums, row_scale_ptr, read, x_row_scale_ptr, token, token < num_tokens)
    y_at = y_ptr + token.to(tl.int64)[None, :] * num_rows + row[:, None]
    tl.store(y_at, narrow(sums, y_ptr), mask=(row < num_rows)[:, None] & (token < num_tokens)[None, :])


@triton.jit
def _native_gate_up_kernel(
    y_ptr, slot_ptr, expert_ptr, count_ptr, x_ptr, x_scale_ptr, x_row_scale_ptr, x_stride, x_scale_stride,
    code_ptr, scale_ptr, row_scale_ptr, code_stride, scale_stride,
    expert_code_stride, expert_scale_stride, num_pairs, intermediate, padded, width, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, EVEN:
    tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(count_ptr):
        return
    expert = tl.load(expert_ptr + tile)
    pair = tl.load(slot_ptr + tile * TOKENS + tl.arange(0, TOKENS))
    HALF: tl.constexpr = ROWS // 2
    part = tl.arange(0, ROWS) // HALF
    row = tl.minimum(block * HALF + tl.arange(0, ROWS) % HALF, intermediate - 1) + part * intermediate
    sums = _native_product(
        x_ptr, x_scale_ptr, pair // TOP_K, pair < num_pairs, x_stride, x_scale_stride,
        code_ptr + expert.to(tl.int64) * expert_code_stride, row * code_stride,
        scale_ptr + expert.to(tl.int64) * expert_scale_stride, scale_offset(row, scale_stride, BLOCK_SIZE),
        width, ROWS, TOKENS, WIDTH, BLOCK_SIZE, EVEN,
    )  # fmt: skip
    row_scale_ptr += expert * 2 * intermediate
    sums = _rescaled(sums, row_scale_ptr, row, x_row_scale_ptr, pair // TOP_K, pair < num_pairs)
    gate, up = tl.split(sums.reshape(2, HALF, TOKENS).permute(1, 2, 0))
    neuron = block * HALF + tl.arange(0, HALF)
    activated = tl.where((neuron < intermediate)[:, None], gate * tl.sigmoid(gate) * up, 0.0)
    y_at = y_ptr + pair.to(tl.int64)[None, :] * padded + neuron[:, None]
    tl.store(y_at, narrow(activated, y_ptr), mask=(neuron < padded)[:, None] & (pair < num_pairs)[None, :])


@triton.jit
def _native_down_kernel(
    y_ptr, weight_ptr, slot_ptr, expert_ptr, count_ptr,
    x_ptr, x_scale_ptr, x_row_scale_ptr, x_stride, x_scale_stride,
    code_ptr, scale_ptr, row_scale_ptr, code_stride, scale_stride,
    expert_code_stride, expert_scale_stride, num_pairs, num_rows, width,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, EVEN:
    tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(count_ptr):
        return
    expert = tl.load(expert_ptr + tile)
    pair = tl.load(slot_ptr + tile * TOKENS + tl.arange(0, TOKENS))
    row = block * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(row, num_rows - 1)
    sums = _native_product(
        x_ptr, x_scale_ptr, pair, pair < num_pairs, x_stride, x_scale_stride,
        code_ptr + expert.to(tl.int64) * expert_code_stride, read * code_stride,
        scale_ptr + expert.to(tl.int64) * expert_scale_stride, scale_offset(read, scale_stride, BLOCK_SIZE),
        width, ROWS, TOKENS, WIDTH, BLOCK_SIZE, EVEN,
    )  # fmt: skip
    sums = _rescaled(sums, row_scale_ptr + expert * num_rows, read, x_row_scale_ptr, pair, pair < num_pairs)
    weight = tl.load(weight_ptr + pair, mask=pair < num_pairs, other=0.0)
    y_at = y_ptr + pair.to(tl.int64)[None, :] * num_rows + row[:, None]
    tl.store(y_at, sums * weight[None, :], mask=(row < num_rows)[:, None] & (pair < num_pairs)[None, :])


@triton.jit
def _native_product(
    x_ptr, x_scale_ptr, token, is_token, x_stride, x_scale_stride,
    code_ptr, code_offsets, scale_ptr, scale_offsets, width,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, EVEN:
    tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, TOKENS]; row and token scales are left to `_rescaled`.

    token, is_token: [TOKENS]; code_offsets [ROWS] in bytes; scale_offsets [ROWS] in words.
    """
    X_WIDTH: tl.constexpr = WIDTH // 2 if BLOCK_SIZE == 16 else WIDTH
    BLOCKS: tl.constexpr = 64 // BLOCK_SIZE
    X_WORDS: tl.constexpr = WIDTH // BLOCK_SIZE // 4
    x_column = tl.arange(0, X_WIDTH)[:, None]
    code = tl.arange(0, WIDTH // 2)[None, :]
    word = tl.arange(0, BLOCKS)[None, :]
    x_word = tl.arange(0, X_WORDS)[None, :]
    x_offsets = token.to(tl.int64)[None, :] * x_stride
    x_scale_offsets = token.to(tl.int64)[:, None] * x_scale_stride
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, width, WIDTH):
        words = tl.load(scale_ptr + (scale_offsets[:, None] + word))
        if EVEN:
            codes = tl.load(code_ptr + (code_offsets[:, None] + code))
            x = tl.load(x_ptr + (x_offsets + x_column), mask=is_token[None, :], other=0)
            x_words = tl.load(x_scale_ptr + (x_scale_offsets + x_word), mask=is_token[:, None], other=0)
        else:
            left = width - first
            codes = tl.load(code_ptr + (code_offsets[:, None] + code), mask=(code // 32) * 64 < left, other=0)
            is_x = is_token[None, :] & (x_column // (X_WIDTH // (WIDTH // 64)) * 64 < left)
            x = tl.load(x_ptr + (x_offsets + x_column), mask=is_x, other=0)
            is_x_scale = is_token[:, None] & (x_word * 4 * BLOCK_SIZE < left)
            x_words = tl.load(x_scale_ptr + (x_scale_offsets + x_word), mask=is_x_scale, other=0)
        if BLOCK_SIZE == 32:
            words += 0x70707070  # exponents of float16 to those of E8M0: 127 - 15
        # [row, t, b] -> [row, b, t]
        scales = _bytes(words).reshape(ROWS, BLOCKS, 4).permute(0, 2, 1).reshape(ROWS, WIDTH // BLOCK_SIZE)
        x_scales = _bytes(x_words).reshape(TOKENS, WIDTH // BLOCK_SIZE)
        if BLOCK_SIZE == 16:
            scales = scales.to(tl.float8e4nv, bitcast=True)
            x_scales = x_scales.to(tl.float8e4nv, bitcast=True)
            total = tl.dot_scaled(codes, scales, "e2m1", x, x_scales, "e2m1", total)
        else:
            total = tl.dot_scaled(codes, scales, "e2m1", x, x_scales, "e4m3", total)
        x_ptr += X_WIDTH
        code_ptr += WIDTH // 2
        scale_ptr += 16 * BLOCKS
        x_scale_ptr += X_WORDS
    if BLOCK_SIZE == 16:
        total *= 0.00390625  # 2^-8, which row scales make up for elsewhere
    return total


@triton.jit
def _bytes(words):
    """uint8 [R, W, 2, 2]: byte 2i + j of int32 words [R, W] at [..., i, j]."""
    even = tl.join(words & 0xFF, words >> 16 & 0xFF)
    odd = tl.join(words >> 8 & 0xFF, words >> 24 & 0xFF)
    return tl.join(even, odd).to(tl.uint8)


@triton.jit
def _rescaled(sums, row_scale_ptr, row, x_row_scale_ptr, token, is_token):
    """sums [ROWS, TOKENS] times the scales of rows and, where there are such, of tokens."""
    sums = sums * tl.load(row_scale_ptr + row)[:, None]
    if x_row_scale_ptr is not None:
        sums = sums * tl.load(x_row_scale_ptr + token, mask=is_token, other=0.0)[None, :]
    return sums
