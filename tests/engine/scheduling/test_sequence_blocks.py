"""Blocks are taken as sequences grow, all or none where several do, and given back together."""

from __future__ import annotations

import pytest

from nybble.engine.messages import Request, SamplingParams
from nybble.engine.scheduling.block_pool import BlockPool
from nybble.engine.scheduling.sequence import Sequence
from nybble.engine.scheduling.sequence_blocks import SequenceBlocks

SIZE = 4


def sequence(name: str) -> Sequence:
    sampling = SamplingParams(max_tokens=8)
    return Sequence(Request(request_id=name, prompt_token_ids=(1, 2), sampling=sampling), sampling, SIZE)


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(5)


@pytest.fixture
def blocks(pool: BlockPool) -> SequenceBlocks:
    return SequenceBlocks(pool, SIZE)


@pytest.mark.parametrize(("num_tokens", "count"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_counts(blocks: SequenceBlocks, num_tokens: int, count: int) -> None:
    assert blocks.count_for(num_tokens) == count


def test_growing(blocks: SequenceBlocks, pool: BlockPool) -> None:
    one = sequence("a")
    assert blocks.grow(one, 5) and len(one.blocks) == 2
    assert blocks.grow(one, 8) and len(one.blocks) == 2  # there is room already
    assert blocks.grow(one, 3) and len(one.blocks) == 2  # and nothing is given back
    assert not blocks.grow(one, 21)
    assert len(one.blocks) == 2 and pool.num_free == 3
    pool.check([one.blocks.tolist()])


def test_all_grow_or_none(blocks: SequenceBlocks, pool: BlockPool) -> None:
    one, two = sequence("a"), sequence("b")
    assert not blocks.grow_all({one: 12, two: 9})
    assert len(one.blocks) == len(two.blocks) == 0 and pool.num_free == 5
    assert blocks.grow_all({one: 12, two: 8})
    assert (len(one.blocks), len(two.blocks), pool.num_free) == (3, 2, 0)
    pool.check([one.blocks.tolist(), two.blocks.tolist()])


def test_release(blocks: SequenceBlocks, pool: BlockPool) -> None:
    one = sequence("a")
    blocks.grow(one, 20)
    blocks.release(one)
    assert len(one.blocks) == 0 and pool.num_free == 5
    pool.check([])
