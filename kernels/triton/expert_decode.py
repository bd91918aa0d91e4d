"""The experts of a few tokens, straight from their ids: no sorting, two launches.

`expert_gate_up` gives each (token, expert) pair programs of its own, which compute rows of gate and the same
rows of up and store silu(gate) * up. `expert_down` gives each token programs whose warps take one routed
expert each and sum over them with the route weights. The shared expert, where it has the shape and format of
a routed one, is one more pair of each token in the first launch and a second loop in the other. Sums are
taken in a fixed order.

An expert that several tokens share is read once for each of them, mostly from the L2 cache; beyond
`MAX_TOKENS` the grouped kernels are the better choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.triton import activation_order
from nybble.kernels.triton.fp4 import is_roomy, narrow, num_splits, scale_offset, split_product
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.launch import launch as start
from nybble.kernels.triton.stored_order import stored_at

# Up to this many tokens of 8 experts out of 160 share few experts: 64 pairs touch 54 on average.
MAX_TOKENS = 8
_TOKENS = 8  # columns of the smallest matrix instruction; one is used


@dataclass(frozen=True)
class ExpertDecodeLaunch:
    """block_rows: rows of gate and of up (gate_up) or of the output (down) a program; splits: its warps."""

    block_rows: int
    splits: int
    num_stages: int


def expert_gate_up_launch(num_pairs: int, width: int, intermediate: int, arch: int) -> ExpertDecodeLaunch:
    """For num_pairs pairs of tokens [width] with experts of `intermediate` neurons."""
    splits = num_splits(width, 4)
    # Half of the rows fill a chip of about 140 multiprocessors.
    block_rows = 32 if is_roomy(arch) and num_pairs * intermediate >= 32 * 140 * 2 else 16
    return ExpertDecodeLaunch(block_rows, splits, 3)


def expert_down_launch(num_tokens: int, top_k: int, num_rows: int, arch: int) -> ExpertDecodeLaunch:
    """For num_tokens rows of `num_rows` outputs, each of top_k experts."""
    # A second warp without an expert still takes half of the shared one's rows.
    return ExpertDecodeLaunch(32, max(2, triton.next_power_of_2(top_k)), 2)


def expert_gate_up(
    x: Tensor,
    ids: Tensor,
    gate_up: Fp4Matrix,
    shared: Fp4Matrix | None,
    first_expert: int,
    out_dtype: torch.dtype,
    *,
    launch: ExpertDecodeLaunch,
) -> Tensor:
    """out_dtype [T, top_k + 1 if shared, I']: silu(gate) * up of each token's experts, in fragment order.

    x [T, K'], in fragment order; ids int32 [T, top_k]; gate_up: stack [E, 2I, K] of experts first_expert and
    following; shared: [2I, K], whose outputs come last. I' is I padded with zeros to a multiple of 64.
    What belongs to experts that are not in the stack is not written.
    """
    num_tokens, top_k = ids.shape
    intermediate = gate_up.num_rows // 2
    padded = activation_order.padded_width(intermediate)
    num_slots = top_k + (shared is not None)
    y = torch.empty(num_tokens, num_slots, padded, dtype=out_dtype, device=x.device)
    other = gate_up if shared is None else shared
    start(
        _gate_up_kernel,
        (triton.cdiv(padded, launch.block_rows), num_slots, num_tokens),
        x, ids, gate_up.codes.view(torch.uint16), gate_up.scale_words, gate_up.row_scales,
        other.codes.view(torch.uint16), other.scale_words, other.row_scales, y,
        intermediate, padded, first_expert, gate_up.shape[0], gate_up.width, x.stride(0),
        gate_up.width // 4, gate_up.scale_words.stride(-3),
        gate_up.codes.stride(0) // 2, gate_up.scale_words.stride(0),
        TOP_K=top_k,
        HAS_SHARED=shared is not None,
        SPLITS=launch.splits,
        ROWS=launch.block_rows,
        TOKENS=_TOKENS,
        BLOCK_SIZE=gate_up.block_size,
        FLOAT16=gate_up.is_float16,
        EVEN=gate_up.width % (256 * launch.splits) == 0,
        num_warps=launch.splits,
        num_stages=launch.num_stages,
    )  # fmt: skip
    return y


def expert_down(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    down: Fp4Matrix,
    shared: Fp4Matrix | None,
    first_expert: int,
    out_dtype: torch.dtype,
    *,
    launch: ExpertDecodeLaunch,
) -> Tensor:
    """out_dtype [T, N]: the weighted sum of each token's experts, plus the shared one.

    x: what `expert_gate_up` gave; ids int32 and weights float32 [T, top_k]; down: stack [E, N, I]; shared
    [N, I]. Experts that are not in the stack add nothing.
    """
    num_tokens, top_k = ids.shape
    y = torch.empty(num_tokens, down.num_rows, dtype=out_dtype, device=x.device)
    other = down if shared is None else shared
    start(
        _down_kernel,
        (triton.cdiv(down.num_rows, launch.block_rows), num_tokens),
        x, ids, weights, down.codes.view(torch.uint16), down.scale_words, down.row_scales,
        other.codes.view(torch.uint16), other.scale_words, other.row_scales, y,
        down.num_rows, first_expert, down.shape[0], down.width, x.stride(0), x.stride(1),
        down.width // 4, down.scale_words.stride(-3), down.codes.stride(0) // 2, down.scale_words.stride(0),
        TOP_K=top_k,
        HAS_SHARED=shared is not None,
        SPLITS=launch.splits,
        ROWS=launch.block_rows,
        TOKENS=_TOKENS,
        BLOCK_SIZE=down.block_size,
        FLOAT16=down.is_float16,
        EVEN=down.width % 256 == 0,
        EVEN_SHARED=down.width % (128 * launch.splits) == 0,
        maxnreg=168,  # left alone, ptxas spills a few registers so as to fit more programs
        num_warps=launch.splits,
        num_stages=launch.num_stages,
    )  # fmt: skip
    return y


@triton.jit
def _gate_up_kernel(
    x_ptr, id_ptr, code_ptr, scale_ptr, row_scale_ptr,
    shared_code_ptr, shared_scale_ptr, shared_row_scale_ptr, y_ptr,
    intermediate, padded, first_expert, num_experts, width, x_stride,
    code_stride, scale_stride, expert_code_stride, expert_scale_stride,
    TOP_K: tl.constexpr, HAS_SHARED: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, TOKENS:
    tl.constexpr, BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    slot, token = tl.program_id(1), tl.program_id(2)
    if HAS_SHARED and slot == TOP_K:
        code_ptr, scale_ptr, row_scale_ptr = shared_code_ptr, shared_scale_ptr, shared_row_scale_ptr
    else:
        expert = tl.load(id_ptr + token * TOP_K + slot) - first_expert
        if (expert < 0) | (expert >= num_experts):
            return
        code_ptr += expert.to(tl.int64) * expert_code_stride
        scale_ptr += expert.to(tl.int64) * expert_scale_stride
        row_scale_ptr += expert * 2 * intermediate
    # The rows of gate, then the same of up; beyond the last, that one again.
    part = tl.arange(0, 2 * ROWS) // ROWS
    neuron = tl.program_id(0) * ROWS + tl.arange(0, 2 * ROWS) % ROWS
    row = tl.minimum(neuron, intermediate - 1) + part * intermediate
    WORDS: tl.constexpr = 1024 // BLOCK_SIZE
    split = tl.arange(0, SPLITS)[:, None, None]
    is_token = tl.arange(0, TOKENS)[None, None, :] == 0
    sums = split_product(
        x_ptr + token * x_stride, split * 256 + tl.zeros((1, 1, TOKENS), tl.int32), is_token,
        code_ptr, split * 64 + row[None, :, None] * code_stride,
        scale_ptr, split * WORDS + scale_offset(row, scale_stride, BLOCK_SIZE)[None, :, None],
        split * 256, SPLITS * 256, width, SPLITS, 2 * ROWS, TOKENS, BLOCK_SIZE, FLOAT16, EVEN,
    )  # fmt: skip
    # The other tokens' columns are zero.
    products = tl.sum(tl.sum(sums, 0), 1) * tl.load(row_scale_ptr + row)
    gate, up = tl.split(products.reshape(2, ROWS).trans())
    neuron = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    activated = tl.where(neuron < intermediate, gate * tl.sigmoid(gate) * up, 0.0)
    y_ptr += (token * tl.num_programs(1) + slot).to(tl.int64) * padded
    tl.store(y_ptr + stored_at(neuron, True), narrow(activated, y_ptr), mask=neuron < padded)


@triton.jit
def _down_kernel(
    x_ptr, id_ptr, weight_ptr, code_ptr, scale_ptr, row_scale_ptr,
    shared_code_ptr, shared_scale_ptr, shared_row_scale_ptr, y_ptr,
    num_rows, first_expert, num_experts, width, token_stride, slot_stride,
    code_stride, scale_stride, expert_code_stride, expert_scale_stride,
    TOP_K: tl.constexpr, HAS_SHARED: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, TOKENS:
    tl.constexpr, BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, EVEN: tl.constexpr, EVEN_SHARED:
    tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(row, num_rows - 1)
    split = tl.arange(0, SPLITS)
    expert = tl.load(id_ptr + token * TOP_K + split, mask=split < TOP_K, other=-1) - first_expert
    is_held = (split < TOP_K) & (expert >= 0) & (expert < num_experts)
    expert = tl.where(is_held, expert, 0)
    is_token = is_held[:, None, None] & (tl.arange(0, TOKENS)[None, None, :] == 0)
    x_ptr += token.to(tl.int64) * token_stride
    # Triton does not see that a loaded id times a stride of whole 16s is one.
    code_at = tl.multiple_of(expert * expert_code_stride, 16)[:, None, None]
    scale_at = tl.multiple_of(expert * expert_scale_stride, 16)[:, None, None]
    sums = split_product(
        x_ptr, split[:, None, None] * slot_stride + tl.zeros((1, 1, TOKENS), tl.int32), is_token,
        code_ptr, code_at + (read * code_stride)[None, :, None],
        scale_ptr, scale_at + scale_offset(read, scale_stride, BLOCK_SIZE)[None, :, None],
        tl.zeros((SPLITS, 1, 1), tl.int32), 256, width,
        SPLITS, ROWS, TOKENS, BLOCK_SIZE, FLOAT16, EVEN,
    )  # fmt: skip
    weight = tl.load(weight_ptr + token * TOP_K + split, mask=is_held, other=0.0)
    row_scale = tl.load(row_scale_ptr + expert[:, None] * num_rows + read[None, :])
    total = tl.sum(tl.sum(sums, 2) * row_scale * weight[:, None], 0)
    if HAS_SHARED:
        # Half of the warps take the first half of the rows, and each half shares the columns.
        HALF: tl.constexpr = ROWS // 2
        first = (split % (SPLITS // 2))[:, None, None] * 256
        half = (split // (SPLITS // 2))[:, None]
        row = tl.program_id(0) * ROWS + half * HALF + tl.arange(0, HALF)[None, :]
        row = tl.minimum(row, num_rows - 1)
        sums = split_product(
            x_ptr + TOP_K * slot_stride, first + tl.zeros((1, 1, TOKENS), tl.int32),
            tl.arange(0, TOKENS)[None, None, :] == 0,
            shared_code_ptr, first // 4 + (row * code_stride)[:, :, None],
            shared_scale_ptr,
            first // 16 * (64 // BLOCK_SIZE) + scale_offset(row, scale_stride, BLOCK_SIZE)[:, :, None],
            first, SPLITS * 128, width, SPLITS, HALF, TOKENS, BLOCK_SIZE, FLOAT16, EVEN_SHARED,
        )  # fmt: skip
        halves = tl.sum(tl.sum(sums, 2).reshape(2, SPLITS // 2, HALF), 1)
        total += halves.reshape(ROWS) * tl.load(shared_row_scale_ptr + read)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y_ptr += token.to(tl.int64) * num_rows
    tl.store(y_ptr + row, narrow(total, y_ptr), mask=row < num_rows)
