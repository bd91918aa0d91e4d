"""Adding up what the experts of a token made, in float32 and always in the same order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.triton.launch import launch as launch_kernel

_FEW_TOKENS = 64
_PER_WARP = 256  # 16 bytes of bfloat16 for each thread


@dataclass(frozen=True)
class CombineLaunch:
    """A program makes `columns`, a power of two, of one token."""

    columns: int
    num_warps: int


def combine_launch(tokens: int, width: int, arch: int) -> CombineLaunch:
    """The same on every architecture: one warp a program while there are few tokens, to spread them."""
    columns = min(triton.next_power_of_2(width), _PER_WARP if tokens < _FEW_TOKENS else 4 * _PER_WARP)
    return CombineLaunch(columns, num_warps=max(columns // _PER_WARP, 1))


def combine_experts(
    partials: Tensor,
    weights: Tensor | None,
    extra: Tensor | None,
    *,
    dtype: torch.dtype,
    launch: CombineLaunch,
) -> Tensor:
    """[T, H] in `dtype`: the sum over slots of partials [T, slots, H], in their order, then extra [T, H].

    weights: float32 [T, slots], by which partials are multiplied; a slot of weight 0 is not read, so that it
    may hold anything. None: all are added as they are. partials, extra: in any float dtype.
    """
    tokens, num_slots, width = partials.shape
    output = torch.empty(tokens, width, dtype=dtype, device=partials.device)
    launch_kernel(
        _combine_kernel,
        (tokens, triton.cdiv(width, launch.columns)),
        partials,
        weights,
        extra,
        output,
        partials.stride(0),
        partials.stride(1),
        0 if weights is None else weights.stride(0),
        0 if extra is None else extra.stride(0),
        width,
        NUM_SLOTS=num_slots,
        COLUMNS=launch.columns,
        num_warps=launch.num_warps,
    )
    return output


@triton.jit
def _combine_kernel(
    partials_ptr,
    weights_ptr,
    extra_ptr,
    output_ptr,
    token_stride,
    slot_stride,
    weights_stride,
    extra_stride,
    width,
    NUM_SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < width
    partials_ptrs = partials_ptr + token * token_stride + columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in tl.static_range(NUM_SLOTS):
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + token * weights_stride + slot)
            num_read = tl.where(weight != 0, width, 0)
            partial = tl.load(partials_ptrs + slot * slot_stride, mask=columns < num_read, other=0.0)
            total += partial.to(tl.float32) * weight
        else:
            total += tl.load(partials_ptrs + slot * slot_stride, mask=mask, other=0.0).to(tl.float32)
    if extra_ptr is not None:
        total += tl.load(extra_ptr + token * extra_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + token * width + columns, total.to(output_ptr.dtype.element_ty), mask=mask)
