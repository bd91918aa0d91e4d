"""Paged attention of a few query tokens for each sequence: decode, and verification of drafted tokens.

A sequence's context is split among programs, so that one long context fills the GPU. A program attends to its
part and writes the normalised result with its weight, log2 of the sum of 2^score; a second kernel adds the
parts up. How many parts a sequence has follows from its length, which only the device knows: the grid has
room for `num_splits`, of which the first so many have something to do. Where there is room for one only, it
writes the result itself.
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
from nybble.kernels.triton.stored_order import stored_at

MAX_ROWS = 128
_MAX_SPLITS = 128
# Of the split kernel, that run at once: multiprocessors times those that fit in shared memory and registers.
_RESIDENT_PROGRAMS = {80: 2 * 108, 90: 3 * 132, 100: 3 * 148, 120: 2 * 188}


@dataclass(frozen=True)
class DecodeLaunch:
    """rows: packed query tokens and heads of a program; tile: keys it takes at a time; num_splits: parts of a
    context, each of at least `split_tiles` tiles; skips_mask: see `softmax`."""

    rows: int
    tile: int
    num_splits: int
    split_tiles: int
    skips_mask: bool
    num_warps: int
    num_stages: int
    merge_warps: int


def decode_launch(
    shape: AttentionShape,
    arch: int,
    *,
    num_sequences: int,
    max_query_len: int,
    max_context: int,
    block_size: int,
    cache_dtype: torch.dtype,
) -> DecodeLaunch:
    """max_query_len and max_context bound what the device will find. Raises ValueError for a cache that the
    architecture cannot read, and for more query tokens than rows: those are for `paged_prefill_attention`."""
    check_cache(shape.head_dim, block_size, cache_dtype, arch)
    rows = max(16, triton.next_power_of_2(max_query_len * (shape.num_heads // shape.num_kv_heads)))
    if rows > MAX_ROWS:
        raise ValueError(
            f"{max_query_len} query tokens of a KV head's query heads are more than {MAX_ROWS} rows"
        )
    is_float32 = cache_dtype == torch.float32  # multiplied without matrix instructions
    has_wide_instructions = arch in (90, 100)  # wgmma, tcgen05: 64 rows and more in one
    tile = 16 if is_float32 else 64 if rows <= 32 or has_wide_instructions else 32
    num_splits, split_tokens = _splits(num_sequences * shape.num_kv_heads, max_context, arch)
    return DecodeLaunch(
        rows=rows,
        tile=min(tile, block_size),
        num_splits=num_splits,
        split_tiles=split_tokens // min(tile, block_size),
        skips_mask=rows >= 64 and has_wide_instructions,
        num_warps=8 if rows == 128 or is_float32 else 4,
        num_stages=3 if rows == 128 or (rows == 16 and arch != 120) else 2,
        merge_warps=min(max(num_splits * shape.head_dim // 2048, 1), 8),
    )


def _splits(num_programs: int, max_context: int, arch: int) -> tuple[int, int]:
    """How many parts a context may have, for num_programs contexts, and the fewest tokens of a part.

    Enough parts to fill the GPU. Where there are many contexts, a few nevertheless, for one may be much
    longer than the others; but then only contexts of thousands of tokens are divided.
    """
    spread = _power_of_2_below(_RESIDENT_PROGRAMS[arch] / num_programs)
    split_tokens = 128 if spread >= 4 else 1024
    most = triton.next_power_of_2(triton.cdiv(max_context, split_tokens))
    return min(max(spread, 4), most, _MAX_SPLITS), split_tokens


def _power_of_2_below(number: float) -> int:
    return 1 << (int(number).bit_length() - 1) if number >= 1 else 1


def paged_decode_attention(
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
    max_query_len: int,
    fragment_order: bool,
    launch: DecodeLaunch,
) -> Tensor:
    """Causal attention of each sequence's last tokens over its context; returns `output`.

    query: [T, num_heads, D]; query head h reads KV head h // (num_heads / num_kv_heads)
    keys, values: [num_blocks, num_kv_heads, block_size, D] and [.., D, block_size], of any block and head
        stride; see `kv_cache_layout`. What an FP8 cache stores is multiplied by key_scale and value_scale,
        float32 [1].
    block_tables: int32 [S, max_blocks]; context_lengths: int32 [S], the tokens at hand included;
        query_starts: int32 [S + 1], at most max_query_len apart. They may be slices of a batch's, since
        query_starts counts rows of query and output. A sequence of context 0 gets zeros.
    scale: of scores before the softmax
    output: [T, num_heads * D] of any dtype and row stride, its columns in fragment order if so asked
    """
    tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    num_sequences = context_lengths.shape[0]
    parts = weights = None
    if launch.num_splits > 1:
        shape = (tokens, num_heads, launch.num_splits)
        parts = torch.empty(*shape, head_dim, dtype=torch.float32, device=query.device)
        weights = torch.empty(shape, dtype=torch.float32, device=query.device)
    launch_kernel(
        _split_kernel,
        (launch.num_splits, num_kv_heads, num_sequences),
        query,
        keys,
        values,
        block_tables,
        context_lengths,
        query_starts,
        key_scale,
        value_scale,
        output,
        parts,
        weights,
        scale * LOG2_E,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        block_tables.stride(0),
        output.stride(0),
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=keys.shape[2],
        ROWS=launch.rows,
        TILE=launch.tile,
        SPLITS=launch.num_splits,
        SPLIT_TILES=launch.split_tiles,
        OPERAND=operand_of(keys.dtype),
        SKIPS_MASK=launch.skips_mask,
        FRAGMENT_ORDER=fragment_order,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if launch.num_splits > 1:
        launch_kernel(
            _merge_kernel,
            (num_heads, max_query_len, num_sequences),
            parts,
            weights,
            context_lengths,
            query_starts,
            output,
            output.stride(0),
            HEAD_DIM=head_dim,
            TILE=launch.tile,
            SPLITS=launch.num_splits,
            SPLIT_TILES=launch.split_tiles,
            FRAGMENT_ORDER=fragment_order,
            num_warps=launch.merge_warps,
        )
    return output


@triton.jit
def _split_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    block_tables_ptr,
    context_lengths_ptr,
    query_starts_ptr,
    key_scale_ptr,
    value_scale_ptr,
    output_ptr,
    parts_ptr,
    weights_ptr,
    scale,
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
    SPLITS: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    OPERAND: tl.constexpr,
    SKIPS_MASK: tl.constexpr,
    FRAGMENT_ORDER: tl.constexpr,
):
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_lengths_ptr + sequence)
    start = tl.load(query_starts_ptr + sequence)
    query_len = tl.load(query_starts_ptr + sequence + 1) - start
    span = _split_keys(context, SPLITS, TILE, SPLIT_TILES)
    first = split * span
    if SPLITS > 1 and first >= context:
        return
    rows = tl.arange(0, ROWS)
    tokens, heads = start + rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = rows < query_len * GROUP
    num_seen_by_first = context - query_len + 1
    m, total, weighted = attend(
        query_ptr + tokens.to(tl.int64) * query_token_stride + heads * query_head_stride,
        is_row,
        num_seen_by_first + rows // GROUP,
        num_seen_by_first,
        keys_ptr + kv_head * key_head_stride,
        values_ptr + kv_head * value_head_stride,
        block_tables_ptr + sequence.to(tl.int64) * table_stride,
        first,
        tl.minimum(first + span, context),
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
    if SPLITS == 1:
        store_heads(output_ptr, output_stride, attended, tokens, heads, is_row, FRAGMENT_ORDER)
    else:
        places = (tokens.to(tl.int64) * (GROUP * tl.num_programs(1)) + heads) * SPLITS + split
        columns = tl.arange(0, HEAD_DIM)
        tl.store(parts_ptr + places[:, None] * HEAD_DIM + columns[None, :], attended, mask=is_row[:, None])
        tl.store(weights_ptr + places, m + tl.math.log2(total), mask=is_row)


@triton.jit
def _merge_kernel(
    parts_ptr,
    weights_ptr,
    context_lengths_ptr,
    query_starts_ptr,
    output_ptr,
    output_stride,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    FRAGMENT_ORDER: tl.constexpr,
):
    head, sequence = tl.program_id(0), tl.program_id(2)
    token = tl.load(query_starts_ptr + sequence) + tl.program_id(1)
    if token >= tl.load(query_starts_ptr + sequence + 1):
        return
    context = tl.load(context_lengths_ptr + sequence)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    is_used = splits * _split_keys(context, SPLITS, TILE, SPLIT_TILES) < context
    places = (token.to(tl.int64) * tl.num_programs(0) + head) * SPLITS + splits
    weights = tl.load(weights_ptr + places, mask=is_used, other=float("-inf"))
    weights = tl.math.exp2(weights - tl.maximum(tl.max(weights, 0), -1e30))
    parts = parts_ptr + places[:, None] * HEAD_DIM + columns[None, :]
    parts = tl.load(parts, mask=is_used[:, None], other=0.0)
    total = tl.sum(weights, 0)
    attended = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    place = (
        output_ptr + token.to(tl.int64) * output_stride + stored_at(head * HEAD_DIM + columns, FRAGMENT_ORDER)
    )
    tl.store(place, attended.to(output_ptr.dtype.element_ty))


@triton.jit
def _split_keys(context, SPLITS: tl.constexpr, TILE: tl.constexpr, SPLIT_TILES: tl.constexpr):
    """How many keys of a context one part has."""
    return tl.maximum(tl.cdiv(tl.cdiv(context, TILE), SPLITS), SPLIT_TILES) * TILE
