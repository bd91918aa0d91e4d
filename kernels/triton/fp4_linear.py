"""y = x W^T for an FP4 matrix W and bfloat16 activations.

Few tokens: a program takes 16 to 64 rows of W and its warps share their columns, so that also a matrix of a
few thousand rows fills the chip; the warps' sums are added in a fixed order. Many tokens: a program takes a
tile of rows by tokens, and tokens are on the small side of the matrix instruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.triton.fp4 import is_roomy, narrow, num_splits, product, scale_offset
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.launch import launch as start


@dataclass(frozen=True)
class Fp4LinearLaunch:
    """block_rows by block_tokens of the output a program.

    splits: warps that share the columns, 1 if none do; is_joined: see `fp4`, for instructions of four warps.
    """

    block_rows: int
    block_tokens: int
    splits: int
    is_joined: bool
    num_warps: int
    num_stages: int


def fp4_linear_launch(num_tokens: int, num_rows: int, width: int, arch: int) -> Fp4LinearLaunch:
    """For x [num_tokens, width] and a matrix [num_rows, width] on compute capability arch / 10."""
    if num_tokens <= 16:
        splits = num_splits(width, 4)
        block_rows = 64 if is_roomy(arch) and num_rows >= 16384 else 32
        block_tokens = 8 if num_tokens <= 8 else 16
        num_stages = 2 if arch == 120 and block_tokens == 16 else 3  # as much as fits in shared memory
        return Fp4LinearLaunch(block_rows, block_tokens, splits, False, splits, num_stages)
    block_tokens = 16 if num_tokens <= 64 else 32 if num_tokens <= 256 or arch == 80 else 64
    if arch == 90 and num_rows >= 4096:
        return Fp4LinearLaunch(256, block_tokens, 1, True, 4 if block_tokens == 16 else 8, 3)
    return Fp4LinearLaunch(128, min(block_tokens, 32), 1, arch in (90, 100), 4, 3)


def fp4_linear(x: Tensor, weight: Fp4Matrix, out_dtype: torch.dtype, *, launch: Fp4LinearLaunch) -> Tensor:
    """out_dtype [T, N] of x [T, weight.width], its columns in fragment order, rows with any stride."""
    num_tokens = x.shape[0]
    y = torch.empty(num_tokens, weight.num_rows, dtype=out_dtype, device=x.device)
    start(
        _fp4_linear_kernel,
        (triton.cdiv(weight.num_rows, launch.block_rows), triton.cdiv(num_tokens, launch.block_tokens)),
        *(x, weight.codes.view(torch.uint16), weight.scale_words, weight.row_scales, y),
        *(
            num_tokens,
            weight.num_rows,
            weight.width,
            x.stride(0),
            weight.width // 4,
            weight.scale_words.stride(-3),
        ),
        SPLITS=launch.splits,
        ROWS=launch.block_rows,
        TOKENS=launch.block_tokens,
        BLOCK_SIZE=weight.block_size,
        FLOAT16=weight.is_float16,
        JOINED=launch.is_joined,
        EVEN=weight.width % (256 * launch.splits) == 0,
        maxnreg=255,  # left alone, ptxas spills a few registers so as to fit more programs
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return y


@triton.jit
def _fp4_linear_kernel(
    x_ptr, code_ptr, scale_ptr, row_scale_ptr, y_ptr, num_tokens, num_rows,
    width, x_stride, code_stride, scale_stride,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, JOINED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[None, :]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    read = tl.minimum(row, num_rows - 1)
    # Rows beyond the last compute it again and store nothing.
    sums = product(
        x_ptr, token * x_stride, token < num_tokens,
        code_ptr, read * code_stride, scale_ptr, scale_offset(read, scale_stride, BLOCK_SIZE),
        width, SPLITS, ROWS, TOKENS, BLOCK_SIZE, FLOAT16, JOINED, EVEN,
    )  # fmt: skip
    row_scale = tl.load(row_scale_ptr + row, mask=row < num_rows, other=0.0)
    y_at = y_ptr + token.to(tl.int64) * num_rows + row
    tl.store(y_at, narrow(sums * row_scale, y_ptr), mask=(row < num_rows) & (token < num_tokens))
