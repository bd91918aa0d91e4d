"""y = x W^T for an FP8 matrix W and 16-bit activations.

As `fp4_linear`: weights are the left operand; for few tokens the warps share the columns, and their
sums are added in a fixed order. Sixteen codes of a row, which lie side by side, are what one thread needs:
they go from one load through shifts, masks and a multiplication for each two (or a conversion for each two)
straight into the matrix instruction. E4M3 is exact in both 16-bit floats. Each word of four codes has two for
each of two operands, which are joined only for instructions of four warps: see `fp4` for the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.triton.fp4 import narrow
from nybble.kernels.triton.fp8_matrix import Fp8Matrix
from nybble.kernels.triton.launch import launch as start

# One word of four codes, in the bit order of `fp8_matrix`, to two pairs of bfloat16, multiplied by 2^120.
# The addend -0.0 makes a multiplication of the fused one that all architectures have.
UNPACK_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 code<2>, part, factor, none;
    and.b32 code0, $2, 0x87F087F0;
    shf.l.wrap.b32 part, $2, $2, 8;
    shl.b32 code1, $2, 4;
    and.b32 part, part, 0x07700770;
    lop3.b32 code1, code1, 0x80808080, part, 0xEA;
    mov.b32 factor, 0x7B807B80;
    mov.b32 none, 0x80008000;
    fma.rn.bf16x2 $0, code0, factor, none;
    fma.rn.bf16x2 $1, code1, factor, none;
}""")

# One word of four codes in natural order to two pairs of float16.
UNPACK_TO_FLOAT16 = tl.constexpr("""{
    .reg .b16 pair<2>;
    mov.b32 {pair0, pair1}, $2;
    cvt.rn.f16x2.e4m3x2 $0, pair0;
    cvt.rn.f16x2.e4m3x2 $1, pair1;
}""")

# A launch should have work for so many multiprocessors; GPUs have 108 (A100) to 188 (RTX PRO 6000).
_PROCESSORS = 140
_TILES_IN_GROUP = 8
# Rows, tokens and warps, by compute capability: larger ones spill registers, or unpack weights twice.
_TILES = {
    80: ((128, 64, 4), (128, 32, 4)),
    90: ((256, 128, 8), (128, 64, 4), (64, 64, 4)),
    100: ((256, 128, 8), (128, 64, 4), (64, 32, 4)),
    120: ((128, 64, 8), (128, 32, 4)),
}


@dataclass(frozen=True)
class Fp8LinearLaunch:
    """block_rows by block_tokens of the output a program.

    splits: warps that share the columns, 1 if none do; is_joined: see `fp4`, for instructions of four warps.
    """

    block_rows: int
    block_tokens: int
    splits: int
    is_joined: bool
    num_warps: int
    num_stages: int


def fp8_linear_launch(num_tokens: int, num_rows: int, width: int, arch: int) -> Fp8LinearLaunch:
    """For x [num_tokens, width] and a matrix [num_rows, width] on compute capability arch / 10.

    The largest tile that leaves work for every multiprocessor; for few tokens, or if no tile does, warps
    share the columns.
    """
    if num_tokens > 32:
        for block_rows, block_tokens, num_warps in _TILES[arch]:
            if triton.cdiv(num_rows, block_rows) * triton.cdiv(num_tokens, block_tokens) >= _PROCESSORS:
                return Fp8LinearLaunch(block_rows, block_tokens, 1, arch in (90, 100), num_warps, 3)
    return _split_launch(num_tokens, num_rows, width)


def _split_launch(num_tokens: int, num_rows: int, width: int) -> Fp8LinearLaunch:
    block_tokens = min(32, max(8, triton.next_power_of_2(num_tokens)))
    total_rows = num_rows * triton.cdiv(num_tokens, block_tokens)
    # Larger blocks cost fewer instructions for a weight, but a processor should have two programs or more.
    fitting = (
        rows for rows in (64, 32) if rows * block_tokens <= 1024 and total_rows >= rows * 2 * _PROCESSORS
    )
    has_few_programs = total_rows < 16 * _PROCESSORS and block_tokens <= 16
    splits = 8 if has_few_programs and width % 1024 == 0 else 4
    return Fp8LinearLaunch(next(fitting, 16), block_tokens, splits, False, splits, 3)


def fp8_linear(x: Tensor, weight: Fp8Matrix, out_dtype: torch.dtype, *, launch: Fp8LinearLaunch) -> Tensor:
    """out_dtype [T, N] of x [T, weight.width], its columns in fragment order, rows with any stride."""
    num_tokens = x.shape[0]
    y = torch.empty(num_tokens, weight.num_rows, dtype=out_dtype, device=x.device)
    start(
        _fp8_linear_kernel,
        _grid(num_tokens, weight.num_rows, launch),
        *(x, weight.codes.view(torch.uint16), weight.row_scales, y),
        *(num_tokens, weight.num_rows, weight.width, x.stride(0)),
        SPLITS=launch.splits,
        ROWS=launch.block_rows,
        TOKENS=launch.block_tokens,
        FLOAT16=weight.is_float16,
        JOINED=launch.is_joined,
        EVEN=weight.width % (128 * launch.splits) == 0,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return y


def _grid(num_tokens: int, num_rows: int, launch: Fp8LinearLaunch) -> tuple[int, int, int]:
    """Token tiles of a group, row blocks, groups: a group has its rows of W from the L2 cache."""
    num_tiles = triton.cdiv(num_tokens, launch.block_tokens)
    num_groups = triton.cdiv(num_tiles, _TILES_IN_GROUP)
    group = triton.cdiv(num_tiles, max(1, num_groups))
    return group, triton.cdiv(num_rows, launch.block_rows), num_groups


@triton.jit
def _fp8_linear_kernel(
    x_ptr, code_ptr, row_scale_ptr, y_ptr, num_tokens, num_rows, width, x_stride,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    FLOAT16: tl.constexpr, JOINED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    first_token = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * TOKENS
    if first_token >= num_tokens:
        return
    token = first_token + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    # Rows beyond the last compute it again and store nothing.
    code_offsets = tl.minimum(row, num_rows - 1)[:, None] * (width // 2)
    x_offsets = (token * x_stride)[None, :]
    is_token = (token < num_tokens)[None, :]
    if SPLITS == 1:
        sums = _tile_product(
            x_ptr, x_offsets, is_token, code_ptr, code_offsets, width, ROWS, TOKENS, FLOAT16, JOINED, EVEN
        )
    else:
        sums = _split_product(
            x_ptr, x_offsets, is_token, code_ptr, code_offsets, width, SPLITS, ROWS, TOKENS, FLOAT16, EVEN
        )
    row_scale = tl.load(row_scale_ptr + row, mask=row < num_rows, other=0.0)
    y_at = y_ptr + token.to(tl.int64)[None, :] * num_rows + row[:, None]
    is_inside = (row < num_rows)[:, None] & (token < num_tokens)[None, :]
    tl.store(y_at, narrow(sums * row_scale[:, None], y_ptr), mask=is_inside)


@triton.jit
def _tile_product(
    x_ptr, x_offsets, is_token, code_ptr, code_offsets, width,
    R: tl.constexpr, TOKENS: tl.constexpr, FLOAT16: tl.constexpr, JOINED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, 128)[:, None]
    code = tl.arange(0, 64)[None, :]
    total = tl.zeros((R, TOKENS), tl.float32)
    for first in range(0, width, 128):
        codes = _load_codes(code_ptr, code_offsets, code, width - first, EVEN)
        weights = unpack_codes(codes, R, FLOAT16)
        if JOINED:
            x = _load_tokens(x_ptr, x_offsets, is_token, column, width - first, EVEN)
            total = tl.dot(joined(weights, R).to(x.dtype), x, total, input_precision="ieee")
        else:
            for e in tl.static_range(2):
                x = _load_tokens(x_ptr, x_offsets, is_token, half(e)[:, None], width - first, EVEN)
                total = tl.dot(weights[e].to(x.dtype), x, total, input_precision="ieee")
        x_ptr += 128
        code_ptr += 64
    return total


@triton.jit
def _split_product(
    x_ptr, x_offsets, is_token, code_ptr, code_offsets, width,
    SPLITS: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, FLOAT16: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The sum of SPLITS products, each of a warp, which take turns at 128 columns."""
    split = tl.arange(0, SPLITS)[:, None, None]
    code = split * 64 + tl.arange(0, 64)[None, None, :]
    x_offsets = x_offsets[None, :, :]
    code_offsets = code_offsets[None, :, :]
    is_token = is_token[None, :, :]
    total = tl.zeros((SPLITS, R, TOKENS), tl.float32)
    for first in range(0, width, SPLITS * 128):
        codes = _load_codes(code_ptr, code_offsets, code, width - first, EVEN)
        weights = unpack_codes(codes.reshape(SPLITS * R, 64), SPLITS * R, FLOAT16)
        for e in tl.static_range(2):
            column = split * 128 + half(e)[None, :, None]
            x = _load_tokens(x_ptr, x_offsets, is_token, column, width - first, EVEN)
            w = weights[e].reshape(SPLITS, R, 64).to(x.dtype)
            total = tl.dot(w, x, total, input_precision="ieee")
        x_ptr += SPLITS * 128
        code_ptr += SPLITS * 64
    return tl.sum(total, 0)


@triton.jit
def _load_codes(pointer, offsets, code, left, EVEN: tl.constexpr):
    """Pairs of codes at `code`, of which `left` columns are in the matrix; EVEN: all are."""
    if EVEN:
        return tl.load(pointer + (offsets + code))
    else:
        return tl.load(pointer + (offsets + code), mask=(code // 32) * 64 < left, other=0)


@triton.jit
def _load_tokens(pointer, offsets, is_token, column, left, EVEN: tl.constexpr):
    """Activations at `column`, likewise."""
    if EVEN:
        return tl.load(pointer + (offsets + column), mask=is_token, other=0.0)
    else:
        is_read = is_token & ((column // 64) * 64 < left)
        return tl.load(pointer + (offsets + column), mask=is_read, other=0.0)


@triton.jit
def unpack_codes(codes, R: tl.constexpr, FLOAT16: tl.constexpr):
    """Two operands [R, 64], 16-bit floats, of codes uint16 [R, 64]. Operand e has the columns `half(e)`."""
    if FLOAT16:
        pairs = tl.inline_asm_elementwise(
            UNPACK_TO_FLOAT16, "=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        pairs = tl.inline_asm_elementwise(
            UNPACK_TO_BFLOAT16, "=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    return _in_order(pairs[0], R), _in_order(pairs[1], R)


@triton.jit
def half(e: tl.constexpr):
    """int32 [64]: the columns of operand e among 128, in the order of `activation_order`."""
    k = tl.arange(0, 64)
    return (k // 8) * 16 + e * 8 + k % 8


@triton.jit
def _in_order(pairs, R: tl.constexpr):
    # [R, block of 64, t, word, j] -> [R, block of 64, word, t, j]
    return pairs.reshape(R, 2, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(R, 64)


@triton.jit
def joined(operands, R: tl.constexpr):
    """[R, 128] of the two of `unpack_codes`."""
    # [R, word, t, j, e] -> [R, word, e, t, j]
    weights = tl.join(operands[0], operands[1]).reshape(R, 8, 4, 2, 2)
    return weights.permute(0, 1, 4, 2, 3).reshape(R, 128)
