"""The order of work of a grouped expert matmul, made on the device from the router's ids.

A *pair* is a token with one of its experts: pair t * top_k + r is rank r of token t. Pairs are sorted by
expert, and each expert's run is filled up to whole tiles of block_m slots, so that a tile has one expert:

    experts of the runs   4       7       9                      block_m = 4
    sorted_slots          p p p . p . . . p p p p p . . .        ascending in a run; . is num_pairs
    tile_experts          4       7       9       9

Where a pair goes is a sum: where its expert's run begins, how many pairs of the expert earlier chunks of
pairs have, and how many stand before it in its own chunk. So up to 1024 pairs take one launch of one program.
More take two: the first counts each chunk; in the second each program reads all counts and places one chunk.
No program waits for another, and nothing depends on the order in which they run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.triton.launch import launch as launch_kernel

_MOST_CHUNK = 1024
_GROUP = 32
_BLOCK_MS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class ExpertSchedule:
    """sorted_slots: int32 [capacity]; the pair in each slot, or num_pairs where there is none
    tile_experts: int32 [capacity / block_m]; of each tile its expert, counted from the first that is held
    num_tiles: int32 [1]; slots and tiles behind them are not written
    is_partial: whether pairs may be in no tile, since other ranks hold their experts
    """

    sorted_slots: Tensor
    tile_experts: Tensor
    num_tiles: Tensor
    block_m: int
    is_partial: bool = False


@dataclass(frozen=True)
class ExpertScheduleLaunch:
    """Pairs that a program places (chunk), and those of them that are compared with each other (group, a
    multiple of 16). Both are powers of two."""

    chunk: int
    group: int
    num_warps: int


def expert_block_m(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Slots of a tile. `num_experts` are those of the model, also where a rank holds a part of them."""
    mean = num_tokens * top_k / num_experts
    return next((block_m for block_m in _BLOCK_MS if mean / block_m < 0.9), _BLOCK_MS[-1])


def schedule_capacity(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Slots, in whole tiles, that suffice for every way to spread the pairs over the experts held.

    The most tiles: each expert has one pair, and the remaining pairs fill whole tiles.
    """
    num_busy = min(num_pairs, num_experts)
    return (num_busy + (num_pairs - num_busy) // block_m) * block_m


def expert_schedule_launch(num_pairs: int, arch: int) -> ExpertScheduleLaunch:
    """The same on every architecture: a thread for each pair of a chunk, a warp for each group."""
    chunk = min(_MOST_CHUNK, max(_GROUP, triton.next_power_of_2(num_pairs)))
    return ExpertScheduleLaunch(chunk=chunk, group=_GROUP, num_warps=max(8, chunk // 32))


def expert_schedule(
    ids: Tensor, first_expert: int, num_experts: int, block_m: int, *, launch: ExpertScheduleLaunch
) -> ExpertSchedule:
    """Of ids int32 [T, top_k], contiguous. Held are `num_experts` experts from `first_expert` on; pairs of
    others are left out."""
    num_pairs = ids.numel()
    capacity = schedule_capacity(num_pairs, num_experts, block_m)
    num_chunks = max(1, triton.cdiv(num_pairs, launch.chunk))
    block_experts = triton.next_power_of_2(max(1, num_experts))
    held = (num_pairs, first_expert, num_experts)
    counts = _empty(ids, num_chunks, block_experts)
    schedule = ExpertSchedule(
        _empty(ids, capacity), _empty(ids, capacity // block_m), _empty(ids, 1), block_m
    )
    if num_chunks > 1:
        launch_kernel(
            _chunk_counts_kernel,
            (num_chunks,),
            *(ids, counts, *held),
            CHUNK=launch.chunk,
            BLOCK_E=block_experts,
            num_warps=4,
        )
    launch_kernel(
        _expert_slots_kernel,
        (num_chunks,),
        *(ids, counts, schedule.sorted_slots, schedule.tile_experts, schedule.num_tiles, *held, num_chunks),
        HAS_COUNTS=num_chunks > 1,
        BLOCK_M=block_m,
        CHUNK=launch.chunk,
        GROUP=launch.group,
        BLOCK_E=block_experts,
        num_warps=launch.num_warps,
    )
    return schedule


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.int32, device=like.device)


@triton.jit
def _chunk_counts_kernel(
    ids_ptr, counts_ptr, num_pairs, first_expert, num_experts, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Program: how many pairs of each expert one chunk has, [chunks, BLOCK_E]."""
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert, is_held = _load_experts(ids_ptr, pair, num_pairs, first_expert, num_experts)
    at = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + at, tl.histogram(expert, BLOCK_E, mask=is_held))


@triton.jit
def _expert_slots_kernel(
    ids_ptr,
    counts_ptr,
    sorted_slots_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    num_pairs,
    first_expert,
    num_experts,
    num_chunks,
    HAS_COUNTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program: the slots of one chunk's pairs, and its share of the tiles' experts and of the empty slots."""
    GROUPS: tl.constexpr = CHUNK // GROUP
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert, is_held = _load_experts(ids_ptr, pair, num_pairs, first_expert, num_experts)
    cell = tl.arange(0, CHUNK) // GROUP * BLOCK_E + expert  # in a table [GROUPS, BLOCK_E]
    count = tl.histogram(cell, GROUPS * BLOCK_E, mask=is_held).reshape(GROUPS, BLOCK_E)
    if HAS_COUNTS:
        total, before = _sum_counts(counts_ptr, chunk, num_chunks, BLOCK_E)
    else:
        total = tl.sum(count, axis=0)
        before = tl.zeros([BLOCK_E], tl.int32)
    tiles = (total + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.cumsum(tiles, axis=0) - tiles
    first_slot = (first_tile * BLOCK_M + before)[None, :] + tl.cumsum(count, axis=0) - count
    slot = tl.gather(first_slot.reshape(GROUPS * BLOCK_E), cell, axis=0)
    slot += _rank_in_group(ids_ptr, chunk * CHUNK, num_pairs, GROUPS, GROUP).reshape(CHUNK)
    tl.store(sorted_slots_ptr + slot, pair, mask=is_held)
    _store_tiles(tile_experts_ptr, first_tile, tiles, chunk, num_chunks, BLOCK_E)
    _store_empty_slots(sorted_slots_ptr, first_tile, total, num_pairs, chunk, num_chunks, BLOCK_M, BLOCK_E)
    if chunk == 0:
        tl.store(num_tiles_ptr, tl.sum(tiles, axis=0))


@triton.jit
def _load_experts(ids_ptr, pair, num_pairs, first_expert, num_experts):
    """Of each pair its expert, counted from the first held (0 for another), and whether it is held."""
    expert = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1) - first_expert
    is_held = (pair < num_pairs) & (expert >= 0) & (expert < num_experts)
    return tl.where(is_held, expert, 0), is_held


@triton.jit
def _rank_in_group(ids_ptr, first_pair, num_pairs, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """int32 [GROUPS, GROUP]: how many pairs of the same group, and before each, have its id."""
    STEP: tl.constexpr = 16
    group = tl.arange(0, GROUPS)[None, :, None] * GROUP + first_pair
    column = tl.arange(0, GROUP)[None, None, :]
    row = tl.arange(0, STEP)[:, None, None]  # down a thread's registers: no shuffle adds them up
    own = tl.load(ids_ptr + group + column, mask=group + column < num_pairs, other=-1)
    rank = tl.zeros([GROUPS, GROUP], tl.int32)
    for step in range(0, GROUP, STEP):
        other = group + step + row
        others = tl.load(ids_ptr + other, mask=other < num_pairs, other=-1)
        # Negative where ids are equal and the other pair is before: there are too few predicates for this.
        difference = others ^ own
        match = (difference - 1) & ~difference & (row - (column - step))
        rank -= tl.sum(match >> 31, axis=0)
    return rank


@triton.jit
def _sum_counts(counts_ptr, chunk, num_chunks, BLOCK_E: tl.constexpr):
    """int32 [BLOCK_E]: pairs of each expert in all chunks, and in those before `chunk`."""
    ROWS: tl.constexpr = 16
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_E)[None, :]
    total = tl.zeros([ROWS, BLOCK_E], tl.int32)
    before = tl.zeros([ROWS, BLOCK_E], tl.int32)
    for first_row in range(0, num_chunks, ROWS):
        at = first_row + row
        count = tl.load(counts_ptr + at * BLOCK_E + column, mask=at < num_chunks, other=0)
        total += count
        before += tl.where(at < chunk, count, 0)
    return tl.sum(total, axis=0), tl.sum(before, axis=0)


@triton.jit
def _store_tiles(tile_experts_ptr, first_tile, tiles, chunk, num_chunks, BLOCK_E: tl.constexpr):
    """Programs take turns along an expert's tiles: all may be of one expert."""
    STEP: tl.constexpr = 8
    expert = tl.arange(0, BLOCK_E)[:, None]
    for first in range(chunk * STEP, tl.max(tiles, axis=0), num_chunks * STEP):
        tile = first + tl.arange(0, STEP)[None, :]
        at = tile_experts_ptr + first_tile[:, None] + tile
        tl.store(at, expert, mask=tile < tiles[:, None])


@triton.jit
def _store_empty_slots(
    sorted_slots_ptr,
    first_tile,
    total,
    num_pairs,
    chunk,
    num_chunks,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """From each expert's last pair to the end of its last tile; programs take turns here, too."""
    STEP: tl.constexpr = 8
    used = (total % BLOCK_M)[:, None]
    end = (first_tile * BLOCK_M + total)[:, None]
    for first in range(chunk * STEP, BLOCK_M, num_chunks * STEP):
        empty = first + tl.arange(0, STEP)[None, :]
        is_empty = (used > 0) & (used + empty < BLOCK_M)
        tl.store(sorted_slots_ptr + end + empty, num_pairs, mask=is_empty)
