"""Paged attention of chunks of any length: prefill, and decode where it shares a step with prefill.

A program takes a tile of rows of one sequence and one KV head. Rows are counted through tokens and heads (see
`softmax`), so that a tile wastes none but in a sequence's last one.

The grid has room for ceil-divided sequences of any lengths: tile t is of the last sequence s with

    (query_starts[s] - query_starts[0]) * GROUP // ROWS + s <= t

for floor(a + b) >= floor(a) + floor(b), and the 1 that the next s adds rounds up. The last tiles start first:
they see the longest contexts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.ops import AttentionShape
from nybble.kernels.triton.launch import launch as launch_kernel
from nybble.kernels.triton.softmax import LOG2_E, attend, check_cache, normalized, operand_of, store_heads


@dataclass(frozen=True)
class PrefillLaunch:
    """rows: packed query tokens and heads of a program; tile: keys it takes at a time; skips_mask: see
    `softmax`."""

    rows: int
    tile: int
    skips_mask: bool
    num_warps: int
    num_stages: int


def prefill_launch(
    shape: AttentionShape, arch: int, *, block_size: int, cache_dtype: torch.dtype
) -> PrefillLaunch:
    """Raises ValueError for a cache that the architecture cannot read.

    128 rows are what two warp groups hold in registers, and tensor memory in its lanes; with half as many,
    keys and values would have to come twice as fast from the L2 cache, which has no more to give.
    """
    check_cache(shape.head_dim, block_size, cache_dtype, arch)
    if cache_dtype == torch.float32:  # multiplied without matrix instructions
        return PrefillLaunch(32, min(16, block_size), skips_mask=False, num_warps=8, num_stages=2)
    has_wide_instructions = arch in (90, 100)  # wgmma, tcgen05; others would spill a tile of 64
    return PrefillLaunch(
        rows=128,
        tile=min(64 if has_wide_instructions else 32, block_size),
        skips_mask=has_wide_instructions,
        num_warps=8,
        num_stages=2 if arch == 100 else 3,
    )


def paged_prefill_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_starts: Tensor,
    *,
    scale: float,
    key_scale: Tensor,
    value_scale: Tensor,
    output: Tensor,
    fragment_order: bool,
    launch: PrefillLaunch,
) -> Tensor:
    """Causal attention of each sequence's last tokens, however many, over its context; returns `output`.

    Arguments are those of `paged_decode_attention`, slices of a batch's among them.
    """
    tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    group, num_sequences = num_heads // num_kv_heads, context_lengths.shape[0]
    launch_kernel(
        _prefill_kernel,
        (tokens * group // launch.rows + num_sequences, num_kv_heads),
        query,
        keys,
        values,
        block_tables,
        context_lengths,
        query_starts,
        key_scale,
        value_scale,
        output,
        scale * LOG2_E,
        num_sequences,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        block_tables.stride(0),
        output.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=keys.shape[2],
        ROWS=launch.rows,
        TILE=launch.tile,
        OPERAND=operand_of(keys.dtype),
        SKIPS_MASK=launch.skips_mask,
        FRAGMENT_ORDER=fragment_order,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return output


@triton.jit
def _prefill_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    block_tables_ptr,
    context_lengths_ptr,
    query_starts_ptr,
    key_scale_ptr,
    value_scale_ptr,
    output_ptr,
    scale,
    num_sequences,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_head_stride,
    value_block_stride,
    value_head_stride,
    table_stride,
    output_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    OPERAND: tl.constexpr,
    SKIPS_MASK: tl.constexpr,
    FRAGMENT_ORDER: tl.constexpr,
):
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    sequence, start, first_row = _place_of(tile, query_starts_ptr, num_sequences, GROUP, ROWS)
    query_len = tl.load(query_starts_ptr + sequence + 1) - start
    if first_row >= query_len * GROUP:
        return
    context = tl.load(context_lengths_ptr + sequence)
    rows = first_row + tl.arange(0, ROWS)
    tokens, heads = start + rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = rows < query_len * GROUP
    num_seen_by_first = context - query_len + 1  # of the sequence's tokens
    _, total, weighted = attend(
        query_ptr + tokens.to(tl.int64) * query_token_stride + heads * query_head_stride,
        is_row,
        num_seen_by_first + rows // GROUP,
        num_seen_by_first + first_row // GROUP,
        keys_ptr + kv_head * key_head_stride,
        values_ptr + kv_head * value_head_stride,
        block_tables_ptr + sequence.to(tl.int64) * table_stride,
        0,
        tl.minimum(num_seen_by_first + (first_row + ROWS - 1) // GROUP, context),
        scale * tl.load(key_scale_ptr),
        key_block_stride,
        value_block_stride,
        ROWS,
        HEAD_DIM,
        BLOCK_SIZE,
        TILE,
        OPERAND,
        SKIPS_MASK,
    )
    attended = normalized(weighted, total, tl.load(value_scale_ptr))
    store_heads(output_ptr, output_stride, attended, tokens, heads, is_row, FRAGMENT_ORDER)


@triton.jit
def _place_of(tile, query_starts_ptr, num_sequences, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The sequence that `tile` is of, where its tokens start, and the tile's first row in the sequence."""
    origin = tl.load(query_starts_ptr)
    num_begun = 0  # sequences with a first tile not after this one
    for base in range(0, num_sequences, 128):
        sequences = base + tl.arange(0, 128)
        is_sequence = sequences < num_sequences
        starts = tl.load(query_starts_ptr + sequences, mask=is_sequence, other=0) - origin
        has_begun = is_sequence & (starts * GROUP // ROWS + sequences <= tile)
        num_begun += tl.sum(has_begun.to(tl.int32), 0)
    sequence = num_begun - 1
    start = tl.load(query_starts_ptr + sequence)
    return sequence, start, (tile - (start - origin) * GROUP // ROWS - sequence) * ROWS
