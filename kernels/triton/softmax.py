"""Attention of one tile of query rows over a paged context, one tile of keys at a time.

Queries that share a KV head are packed into the rows of one matrix: row r is query token r // GROUP of a
sequence and head r % GROUP of the group, so that keys and values are read once for all of them. Row r sees
the first `limits[r]` keys.

The softmax is taken in base 2 and never materialised. Over the keys read so far, each row keeps the largest
score m, the total of 2^(score - m), and the values weighted by the same; a larger score rescales both.

A tile of keys lies in one cache block, so that its entry of the block table is one scalar and not a vector of
addresses; it is read one tile ahead, for the next tile's loads start early. Values are transposed inside the
block (see `kv_cache_layout`): both operands of both products are then contiguous along their sums, which
one-byte values need to be read four at a time. A tile is loaded whole. Keys after the last are masked with
their scores, values by a weight of 0: they may be anything finite.

An FP8 cache is widened to float16, which has all values of E4M3; the error is then 2e-4 of the result (RMS,
8,192 keys). Rounding queries and weights to E4M3 for FP8 matrix instructions was off by 2 to 7 %.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.triton.stored_order import stored_at

LOG2_E = 1.4426950408889634
_OPERANDS = {
    torch.float8_e4m3fn: tl.float16,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


def operand_of(cache_dtype: torch.dtype) -> tl.dtype:
    """The type in which queries meet keys, and weights values."""
    return _OPERANDS[cache_dtype]


def check_cache(head_dim: int, block_size: int, cache_dtype: torch.dtype, arch: int) -> None:
    """Raises ValueError where the kernels cannot read such a cache."""
    if cache_dtype == torch.float8_e4m3fn and arch < 90:
        raise ValueError(f"sm_{arch} cannot read an FP8 cache: it has no conversion from E4M3")
    for name, size in (("head_dim", head_dim), ("block_size", block_size)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} {size} is not a power of two from 16 on")


@triton.jit
def attend(
    query_rows,
    is_row,
    limits,
    num_seen_by_all,
    keys,
    values,
    block_table,
    first,
    last,
    score_scale,
    key_stride,
    value_stride,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    OPERAND: tl.constexpr,
    SKIPS_MASK: tl.constexpr,
):
    """Attend to keys first .. last; first is a multiple of TILE, which divides BLOCK_SIZE.

    query_rows: pointers [ROWS] to query vectors, of which those with is_row [ROWS] are read
    limits: int32 [ROWS]; num_seen_by_all is the least of them
    keys, values: pointers to one KV head in block 0, with strides from block to block
    score_scale: what scores are multiplied by; OPERAND: the type in which products are taken
    SKIPS_MASK: branch around the mask of a tile that all rows see whole

    Returns m [ROWS], total [ROWS] and weighted [ROWS, HEAD_DIM] in float32; total is 0 where nothing is seen.
    """
    FEW_ROWS: tl.constexpr = ROWS <= 32
    m = tl.full((ROWS,), -1e30, tl.float32)  # below any score, and finite: differences are taken of it
    total = tl.zeros((ROWS, TILE) if FEW_ROWS else (ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    dims, slots = tl.arange(0, HEAD_DIM), tl.arange(0, TILE)
    queries = tl.load(query_rows[:, None] + dims[None, :], mask=is_row[:, None], other=0.0).to(OPERAND)
    block = tl.load(block_table + first // BLOCK_SIZE, mask=first < last, other=0)
    for start in range(first, last, TILE):
        following = start + TILE
        next_block = tl.load(block_table + following // BLOCK_SIZE, mask=following < last, other=0)
        slot = tl.multiple_of(start % BLOCK_SIZE, TILE)
        key_tile = keys + block.to(tl.int64) * key_stride + slot * HEAD_DIM
        value_tile = values + block.to(tl.int64) * value_stride + slot
        k = tl.load(key_tile + slots[None, :] * HEAD_DIM + dims[:, None]).to(OPERAND)
        v = tl.load(value_tile + dims[None, :] * BLOCK_SIZE + slots[:, None]).to(OPERAND)
        scores = tl.dot(queries, k, input_precision="ieee")
        if not SKIPS_MASK or following > num_seen_by_all:
            scores = _masked(scores, limits, start, FEW_ROWS)
        new_m = tl.maximum(m, tl.max(scores, 1) * score_scale)
        weights = tl.math.exp2(scores * score_scale - new_m[:, None])
        decay = tl.math.exp2(m - new_m)
        # Few rows are shared by warps, which would wait for each other's sums: each column keeps a total.
        sums = weights if FEW_ROWS else tl.sum(weights, 1)
        total = total * (decay[:, None] if FEW_ROWS else decay) + sums
        weighted = tl.dot(weights.to(OPERAND), v, weighted * decay[:, None], input_precision="ieee")
        m, block = new_m, next_block
    return m, tl.sum(total, 1) if FEW_ROWS else total, weighted


@triton.jit
def _masked(scores, limits, start, FEW_ROWS: tl.constexpr):
    """The two forms mean the same; which costs fewer registers or instructions depends on the rows."""
    slots = tl.arange(0, scores.shape[1])
    if FEW_ROWS:
        is_seen = slots[None, :] < (limits - start)[:, None]
    else:
        is_seen = (start + slots)[None, :] < limits[:, None]
    return tl.where(is_seen, scores, float("-inf"))


@triton.jit
def normalized(weighted, total, value_scale):
    """weighted [ROWS, HEAD_DIM] / total [ROWS] * value_scale; zeros for rows that have seen nothing."""
    return weighted * (value_scale / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit
def store_heads(output, stride, attended, tokens, heads, is_row, FRAGMENT_ORDER: tl.constexpr):
    """Row r of attended [ROWS, HEAD_DIM] to the columns of heads[r] in row tokens[r] of output."""
    ROWS: tl.constexpr = attended.shape[0]
    HEAD_DIM: tl.constexpr = attended.shape[1]
    IN_HEADS: tl.constexpr = FRAGMENT_ORDER and HEAD_DIM % 64 == 0
    if IN_HEADS:  # whole blocks of 64 change order in registers, and are stored in runs
        blocks = attended.reshape(ROWS, HEAD_DIM // 64, 4, 8, 2)
        attended = blocks.permute(0, 1, 3, 2, 4).reshape(ROWS, HEAD_DIM)
    columns = heads[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    places = stored_at(columns, FRAGMENT_ORDER and not IN_HEADS)
    places += tokens.to(tl.int64)[:, None] * stride
    tl.store(output + places, attended.to(output.dtype.element_ty), mask=is_row[:, None])
