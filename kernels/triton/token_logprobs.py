"""`token_logprobs` in two launches: the best of each chunk of a row, then of the row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.token_logprobs import Logprobs
from nybble.kernels.triton.launch import launch as launch_kernel
from nybble.kernels.triton.sort_keys import LOWEST, packed, packed_ids, packed_numbers, sort_keys

_PER_THREAD = 8


@dataclass(frozen=True)
class LogprobsLaunch:
    """chunk: logits of a program of the first kernel, a power of two."""

    chunk: int
    chunk_warps: int
    merge_warps: int


def logprobs_launch(num_columns: int, arch: int) -> LogprobsLaunch:
    """The same on every architecture. Large chunks, since each hands on its own best ones."""
    chunk = min(4096, triton.next_power_of_2(num_columns))
    return LogprobsLaunch(chunk, chunk_warps=max(1, chunk // (32 * _PER_THREAD)), merge_warps=8)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, num_token_ids: int, num_top: int, *, launch: LogprobsLaunch
) -> Logprobs:
    """See `token_logprobs.token_logprobs`. Rows may lie at any distance; columns are adjacent."""
    num_rows, num_columns = logits.shape
    num_top = min(num_top, num_token_ids)
    num_chunks, num_kept = triton.cdiv(num_token_ids, launch.chunk), max(num_top, 1)
    bests = torch.empty(num_rows, num_chunks, num_kept, dtype=torch.int64, device=logits.device)
    sums = logits.new_empty(num_rows, num_chunks)
    found = Logprobs(
        chosen=logits.new_empty(num_rows),
        top_ids=torch.empty(num_rows, num_top, dtype=torch.int64, device=logits.device),
        top=logits.new_empty(num_rows, num_top),
    )
    launch_kernel(
        _best_of_chunk_kernel,
        (num_chunks, num_rows),
        logits,
        logits.stride(0),
        num_columns,
        num_token_ids,
        bests,
        sums,
        num_kept,
        CHUNK=launch.chunk,
        num_warps=launch.chunk_warps,
    )
    launch_kernel(
        _best_of_row_kernel,
        (num_rows,),
        logits,
        logits.stride(0),
        token_ids,
        bests,
        sums,
        num_chunks,
        num_kept,
        num_top,
        found.chosen,
        found.top_ids,
        found.top,
        CHUNKS=triton.next_power_of_2(num_chunks),
        KEPT=triton.next_power_of_2(num_kept),
        num_warps=launch.merge_warps,
    )
    return found


@triton.jit
def _best_of_chunk_kernel(
    logits, row_stride, num_columns, num_token_ids, bests, sums, num_kept, CHUNK: tl.constexpr
):  # fmt: skip
    """bests [S, chunks, num_kept]: packed, falling; sums [S, chunks]: of e^(x - the largest of the chunk)."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    place = row * tl.num_programs(0) + chunk
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    row_logits = logits + row.to(tl.int64) * row_stride
    x = tl.load(row_logits + ids, mask=ids < num_columns, other=float("-inf"))
    x = tl.where(ids < num_token_ids, x, float("-inf"))
    items = packed(sort_keys(x), ids)
    largest = packed_numbers(tl.max(items))
    is_empty = largest == float("-inf")
    tl.store(sums + place, tl.sum(tl.exp(x - tl.where(is_empty, 0.0, largest))))
    for i in range(num_kept):
        best = tl.max(items)
        tl.store(bests + place * num_kept + i, best)
        items = tl.where(items == best, LOWEST, items)


@triton.jit
def _best_of_row_kernel(
    logits, row_stride, token_ids, bests, sums, num_chunks, num_kept, num_top,
    chosen, top_ids, top,
    CHUNKS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    row, chunks, kept = tl.program_id(0), tl.arange(0, CHUNKS), tl.arange(0, KEPT)
    is_chunk = chunks < num_chunks
    first = (row * num_chunks + chunks) * num_kept
    largest = tl.load(bests + first, mask=is_chunk, other=LOWEST)
    largest = tl.where(is_chunk, packed_numbers(largest), float("-inf"))
    items = tl.load(
        bests + first[:, None] + kept[None, :],
        mask=is_chunk[:, None] & (kept < num_kept)[None, :],
        other=LOWEST,
    )
    row_largest = packed_numbers(tl.max(items))
    chunk_sums = tl.load(sums + row * num_chunks + chunks, mask=is_chunk, other=0.0)
    # Of the numbers less the largest: added to it, the logarithm would lose digits.
    log_sum = tl.log(tl.sum(chunk_sums * tl.exp(largest - row_largest)))
    x = tl.load(logits + row.to(tl.int64) * row_stride + tl.load(token_ids + row))
    tl.store(chosen + row, x - row_largest - log_sum)
    for i in range(num_top):
        best = tl.max(items)
        tl.store(top_ids + row * num_top + i, packed_ids(best).to(tl.int64))
        tl.store(top + row * num_top + i, packed_numbers(best) - row_largest - log_sum)
        items = tl.where(items == best, LOWEST, items)
