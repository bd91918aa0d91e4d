"""The schedule of the grouped expert matmul against a stable sort."""

from __future__ import annotations

import itertools

import pytest
import torch
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.triton.expert_schedule import (
    ExpertSchedule,
    ExpertScheduleLaunch,
    expert_block_m,
    expert_schedule,
    expert_schedule_launch,
    schedule_capacity,
)
from nybble.kernels.triton.launch import recorded_launches

UNWRITTEN = torch.iinfo(torch.int32).max  # as `poisoned` leaves it
SMALL_CHUNKS = ExpertScheduleLaunch(chunk=64, group=16, num_warps=4)


def _ids(num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """Different experts for each token, low ids more often."""
    generator = torch.Generator().manual_seed(seed + 7919 * num_tokens + num_experts)
    preferences = torch.rand(num_tokens, num_experts, generator=generator) * torch.arange(1, num_experts + 1)
    return preferences.argsort(dim=-1)[:, :top_k].int().contiguous().to(DEVICE)


def _schedule(
    ids: Tensor,
    held: range,
    block_m: int,
    launch: ExpertScheduleLaunch | None = None,
) -> ExpertSchedule:
    launch = launch or expert_schedule_launch(ids.numel(), ARCHES[0])
    return expert_schedule(ids, held.start, len(held), block_m, launch=launch)


def _expected(ids: Tensor, held: range, block_m: int) -> tuple[list[int], list[int]]:
    """Slots and the experts of the tiles."""
    flat = ids.flatten().cpu().long()
    ordered = flat.argsort(stable=True).tolist()
    runs = {expert: [pair for pair in ordered if flat[pair] == expert] for expert in set(flat.tolist())}
    slots, tiles = [], []
    for row, expert in enumerate(held):
        run = runs.get(expert, [])
        num_tiles = -(-len(run) // block_m)
        slots += run + [len(flat)] * (num_tiles * block_m - len(run))
        tiles += [row] * num_tiles
    return slots, tiles


def _assert_schedule(schedule: ExpertSchedule, ids: Tensor, held: range, block_m: int) -> None:
    slots, tiles = _expected(ids, held, block_m)
    capacity = schedule_capacity(ids.numel(), len(held), block_m)
    assert schedule.block_m == block_m
    assert schedule.num_tiles.tolist() == [len(tiles)]
    assert schedule.tile_experts.tolist() == tiles + [UNWRITTEN] * (capacity // block_m - len(tiles))
    assert schedule.sorted_slots.tolist() == slots + [UNWRITTEN] * (capacity - len(slots))


@pytest.mark.parametrize("block_m", [8, 16, 128])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"),
    [(1, 1, 1), (9, 8, 160), (10, 3, 7), (33, 2, 16), (63, 8, 40), (128, 8, 16), (129, 8, 16), (300, 7, 12)],
)
def test_schedule(num_tokens: int, top_k: int, num_experts: int, block_m: int) -> None:
    ids, held = _ids(num_tokens, top_k, num_experts), range(num_experts)
    _assert_schedule(_schedule(ids, held, block_m), ids, held, block_m)


@pytest.mark.parametrize("num_tokens", [31, 32, 33, 250])
def test_many_chunks(num_tokens: int) -> None:
    ids, held = _ids(num_tokens, 4, 24), range(24)
    _assert_schedule(_schedule(ids, held, 8, SMALL_CHUNKS), ids, held, 8)


@pytest.mark.parametrize("held", [range(4), range(4, 11), range(15, 16), range(16)], ids=str)
@pytest.mark.parametrize("launch", [None, SMALL_CHUNKS], ids=["one-chunk", "small-chunks"])
def test_a_rank_holds_some_of_the_experts(held: range, launch: ExpertScheduleLaunch | None) -> None:
    ids = _ids(50, 4, 16)
    _assert_schedule(_schedule(ids, held, 8, launch), ids, held, 8)


@pytest.mark.parametrize("expert", [0, 6, 15])
@pytest.mark.parametrize("num_tokens", [5, 300, 1500])
def test_all_tokens_on_one_expert(num_tokens: int, expert: int) -> None:
    ids = torch.full((num_tokens, 1), expert, dtype=torch.int32, device=DEVICE)
    _assert_schedule(_schedule(ids, range(16), 8), ids, range(16), 8)


@pytest.mark.parametrize("launch", [None, SMALL_CHUNKS], ids=["one-chunk", "small-chunks"])
@pytest.mark.parametrize("held", [range(8, 16), range(3, 3)], ids=str)
def test_no_pair_is_held(held: range, launch: ExpertScheduleLaunch | None) -> None:
    ids = _ids(40, 2, 8)
    _assert_schedule(_schedule(ids, held, 16, launch), ids, held, 16)


def test_no_tokens() -> None:
    ids = torch.empty(0, 8, dtype=torch.int32, device=DEVICE)
    schedule = _schedule(ids, range(16), 8)
    assert schedule.num_tiles.tolist() == [0]
    assert schedule.sorted_slots.shape == schedule.tile_experts.shape == (0,)


def test_experts_that_do_not_exist_are_left_out() -> None:
    ids, held = _ids(20, 4, 16), range(2, 12)
    ids[3, 1], ids[7, 0], ids[8], ids[19, 3] = -1, 16, -(2**31), 2**31 - 1
    _assert_schedule(_schedule(ids, held, 8), ids, held, 8)


def test_two_runs_are_equal() -> None:
    ids = _ids(400, 6, 32)
    first, second = _schedule(ids, range(32), 16), _schedule(ids, range(32), 16)
    assert first.sorted_slots.equal(second.sorted_slots)
    assert first.tile_experts.equal(second.tile_experts)


@pytest.mark.parametrize(("num_tokens", "num_launches"), [(1, 1), (128, 1), (129, 2), (16_384, 2)])
def test_launches(num_tokens: int, num_launches: int) -> None:
    with recorded_launches() as launches:
        ids = torch.empty(num_tokens, 8, dtype=torch.int32, device="meta")
        _schedule(ids, range(160), 8)
    assert len(launches) == num_launches


@pytest.mark.parametrize("block_m", [1, 2, 3, 8])
@pytest.mark.parametrize("num_experts", [1, 2, 3])
def test_capacity_is_what_the_worst_spread_takes(num_experts: int, block_m: int) -> None:
    for num_pairs in range(9):
        spreads = itertools.product(range(num_pairs + 1), repeat=num_experts)
        tiles = [sum(-(-n // block_m) for n in counts) for counts in spreads if sum(counts) <= num_pairs]
        assert schedule_capacity(num_pairs, num_experts, block_m) == max(tiles) * block_m


@pytest.mark.parametrize(
    ("num_tokens", "block_m"),
    [(1, 8), (128, 8), (143, 8), (144, 16), (287, 16), (288, 32), (1151, 64), (1152, 128), (16_384, 128)],
)
def test_block_m(num_tokens: int, block_m: int) -> None:
    """The mean number of tokens of an expert, num_tokens / 20 here, is less than 0.9 tiles."""
    assert expert_block_m(num_tokens, 8, 160) == block_m
