"""Sampling in two launches, whatever the rows ask for.

`_chunk_kernel`, a program for each chunk of each row, finds the chunk's largest logit and, if the row is
drawn, which of its tokens is the first to arrive; if the row has filters, also what the chunk weighs and the
peaks of its segments. `_pick_kernel`, a program for each row, merges the chunks; only if filters drop the
token that they gave there is much more to do, see `token_filter`.

Random bits are those of `random_bits`, all else is float32: a pick differs from the reference's where the
scores of two tokens are closer than some 1e-6, or where a token is as close to the border of a filter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.ops import SamplingBatch
from nybble.kernels.triton.launch import launch as launch_kernel
from nybble.kernels.triton.sort_keys import (
    LOWEST,
    MINUS_INFINITY_KEY,
    packed,
    packed_ids,
    packed_numbers,
    sort_keys,
)
from nybble.kernels.triton.token_filter import (
    SEGMENT,
    first_kept_token,
    first_to_arrive,
    load_logits,
    segment_ids,
    weights_of,
)

_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_LARGEST_TEMPERATURE = tl.constexpr(1e30)  # all logits are the same long before, and its inverse is not 0
_PER_THREAD = 8  # logits, of which 16 bytes are loaded at once


@dataclass(frozen=True)
class SamplingLaunch:
    """chunk: logits of a program of the first kernel. tile: logits that a step of the second one's loops
    takes. Both are powers of two and at least a segment."""

    chunk: int
    chunk_warps: int
    tile: int
    tile_warps: int


def sampling_launch(num_columns: int, arch: int) -> SamplingLaunch:
    """The same on every architecture. Chunks are small, so that one row keeps all of a GPU busy; a tile is
    as large as registers allow, since the search is one program's."""
    width = max(SEGMENT.value, triton.next_power_of_2(num_columns))
    chunk, tile = min(1024, width), min(4096, width)
    return SamplingLaunch(chunk, _num_warps(chunk), tile, _num_warps(tile))


def _num_warps(width: int) -> int:
    return max(1, width // (32 * _PER_THREAD))


def sample(logits: Tensor, batch: SamplingBatch, num_token_ids: int, *, launch: SamplingLaunch) -> Tensor:
    """int64 [S]: what `Ops.sample` picks from the first num_token_ids columns of logits, float32 [S, V].

    Rows may lie at any distance; columns are adjacent. A row whose largest logit is infinite or NaN is
    picked greedily, NaN being the largest. A temperature below the normal numbers counts as 0.
    """
    num_rows, num_columns = logits.shape
    num_chunks = triton.cdiv(num_token_ids, launch.chunk)
    bests = torch.empty(num_rows, num_chunks, dtype=torch.int64, device=logits.device)
    winners, weights = torch.empty_like(bests), torch.empty_like(bests)
    peaks = logits.new_empty(num_rows, num_chunks * launch.chunk // SEGMENT.value)
    listed = torch.empty_like(peaks, dtype=torch.int32)
    picks = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    requests = (batch.temperatures, batch.top_ks, batch.top_ps, batch.min_ps, batch.draws)
    inputs = (logits, logits.stride(0), num_columns, num_token_ids, *requests, bests, winners, weights, peaks)
    launch_kernel(
        _chunk_kernel, (num_chunks, num_rows), *inputs, CHUNK=launch.chunk, num_warps=launch.chunk_warps
    )
    launch_kernel(
        _pick_kernel,
        (num_rows,),
        *inputs,
        num_chunks,
        peaks.shape[1],
        listed,
        picks,
        CHUNKS=triton.next_power_of_2(num_chunks),
        TILE=launch.tile,
        num_warps=launch.tile_warps,
    )
    return picks


@triton.jit
def _chunk_kernel(
    logits, row_stride, num_columns, num_token_ids,
    temperatures, top_ks, top_ps, min_ps, draws,
    bests, winners, weights, peaks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """bests, winners [S, chunks]: the token with the largest logit, and the first to arrive, both packed.
    weights [S, chunks], peaks [S, segments]: only of rows with filters."""
    chunk, row, num_chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    place = row * num_chunks + chunk
    segments = tl.arange(0, CHUNK // SEGMENT)
    ids = segment_ids(segments) + chunk * CHUNK
    x = load_logits((logits + row.to(tl.int64) * row_stride, num_columns, num_token_ids), ids)
    best = tl.max(packed(sort_keys(x), ids))
    tl.store(bests + place, best)
    temperature = tl.load(temperatures + row)
    if _is_drawn(temperature):
        scale = (_finite(packed_numbers(best)), _inverse(temperature))
        tl.store(winners + place, first_to_arrive(x, ids, tl.load(draws + row), scale))
        if _has_filter(tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)):
            tl.store(weights + place, tl.sum(weights_of(x, scale)))
            tl.store(peaks + place * (CHUNK // SEGMENT) + segments, tl.max(x, 1))


@triton.jit
def _pick_kernel(
    logits, row_stride, num_columns, num_token_ids,
    temperatures, top_ks, top_ps, min_ps, draws,
    bests, winners, weights, peaks, num_chunks, num_segments, listed, picks,
    CHUNKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, chunks = tl.program_id(0), tl.arange(0, CHUNKS)
    places, is_chunk = row * num_chunks + chunks, chunks < num_chunks
    chunk_bests = tl.load(bests + places, mask=is_chunk, other=LOWEST)
    pick = tl.max(chunk_bests)
    top, temperature = packed_numbers(pick), tl.load(temperatures + row)
    if _is_drawn(temperature) & (top == _finite(top)):
        scale = (top, _inverse(temperature))
        tops = tl.where(is_chunk, packed_numbers(chunk_bests), float("-inf"))
        rates = tl.exp((tops - top) * scale[1])
        chunk_winners = tl.load(winners + places, mask=is_chunk, other=LOWEST)
        keys = sort_keys(packed_numbers(chunk_winners) / rates)
        pick = tl.max(packed(tl.where(rates > 0, keys, MINUS_INFINITY_KEY), packed_ids(chunk_winners)))
        filters = (tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row))
        if _has_filter(*filters):
            chunk_weights = tl.load(weights + places, mask=is_chunk, other=0)
            total = tl.sum(chunk_weights.to(tl.float64) * rates.to(tl.float64))
            row_logits = (logits + row.to(tl.int64) * row_stride, num_columns, num_token_ids)
            row_peaks = (peaks + row * num_segments, listed + row * num_segments, num_segments)
            draw = tl.load(draws + row)
            pick = first_kept_token(row_logits, row_peaks, filters, draw, pick, scale, total, TILE)
    tl.store(picks + row, packed_ids(pick).to(tl.int64))


@triton.jit
def _is_drawn(temperature):
    return temperature >= _SMALLEST_NORMAL


@triton.jit
def _has_filter(top_k, top_p, min_p):
    return (top_k > 0) | (top_p < 1) | (min_p > 0)


@triton.jit
def _inverse(temperature):
    return 1.0 / tl.minimum(temperature, _LARGEST_TEMPERATURE)


@triton.jit
def _finite(x):
    """0 in place of infinities and NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)
