"""SiLU of the gate times up, rounded where the reference does: after the SiLU and after the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.triton.fp4 import narrow
from nybble.kernels.triton.launch import launch as launch_kernel
from nybble.kernels.triton.row import in_fragment_order

_TILE = 1024
_PER_WARP = 256  # 16 bytes of bfloat16 for each thread


@dataclass(frozen=True)
class SiluMulLaunch:
    """A program makes `columns` of `rows` rows; both are powers of two, columns at least 64."""

    rows: int
    columns: int
    num_warps: int


def silu_mul_launch(tokens: int, padded_width: int, arch: int) -> SiluMulLaunch:
    """The same on every architecture: as many columns as divide the width, and rows to fill a tile."""
    columns = min(padded_width & -padded_width, _TILE)
    rows = min(_TILE // columns, triton.next_power_of_2(max(tokens, 1)))
    return SiluMulLaunch(rows, columns, num_warps=max(rows * columns // _PER_WARP, 1))


def silu_mul(
    gate_up: Tensor, *, fragment_order: bool, padded_width: int, dtype: torch.dtype, launch: SiluMulLaunch
) -> Tensor:
    """`dtype` [T, padded_width]: silu(gate) * up of gate_up [T, 2I], gate being the first I columns.

    padded_width: a multiple of 64; columns from I on are zeros. Rows of gate_up may lie at any distance.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty(rows, padded_width, dtype=dtype, device=gate_up.device)
    launch_kernel(
        _silu_mul_kernel,
        (triton.cdiv(rows, launch.rows), triton.cdiv(padded_width, launch.columns)),
        gate_up,
        output,
        gate_up.stride(0),
        rows,
        width,
        padded_width,
        FRAGMENT_ORDER=fragment_order,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        num_warps=launch.num_warps,
    )
    return output


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,
    output_ptr,
    gate_up_stride,
    num_rows,
    width,
    padded_width,
    FRAGMENT_ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    gate_ptrs = gate_up_ptr + rows.to(tl.int64) * gate_up_stride + columns
    mask = (rows < num_rows) & (columns < width)
    gate = tl.load(gate_ptrs, mask=mask, other=0.0)
    up = tl.load(gate_ptrs + width, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    product = (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    output = narrow(product.to(tl.float32), output_ptr)
    if FRAGMENT_ORDER:
        output = in_fragment_order(output)
    output_ptrs = output_ptr + rows.to(tl.int64) * padded_width + columns
    tl.store(output_ptrs, output, mask=(rows < num_rows) & (columns < padded_width))
