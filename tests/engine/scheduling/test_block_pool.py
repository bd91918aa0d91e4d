from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nybble.engine.scheduling.block_pool import BlockPool, OutOfBlocksError, hash_block


def _hashed(previous: bytes, token_ids: Sequence[int]) -> bytes:
    return hash_block(previous, array("i", token_ids))


def test_blocks_are_handed_out_once() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(2) + pool.allocate(3)
    assert sorted(blocks) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check([blocks[:2], blocks[2:]])


def test_running_out_takes_nothing() -> None:
    pool = BlockPool(3)
    [owned] = pool.allocate(1)
    with pytest.raises(OutOfBlocksError, match="3 blocks wanted, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2
    pool.check([[owned]])
    assert len(pool.allocate(2)) == 2


def test_allocating_nothing_from_an_exhausted_pool() -> None:
    pool = BlockPool(0)
    assert pool.allocate(0) == []


def test_released_blocks_stay_findable_until_they_are_reused() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"first")
    pool.register(blocks[1], b"second")
    pool.release(blocks)
    assert pool.num_free == 2
    assert pool.find_prefix([b"first", b"second"]) == blocks
    assert pool.allocate(1) == [blocks[1]]  # the tail goes first
    assert pool.find_prefix([b"first", b"second"]) == blocks[:1]
    pool.allocate(1)
    assert pool.find_prefix([b"first"]) == []


def test_the_least_recently_released_is_reused_first() -> None:
    pool = BlockPool(4)
    a, b, c, d = pool.allocate(4)
    pool.release([c])
    pool.release([a, b])
    pool.release([d])
    assert pool.allocate(4) == [c, b, a, d]


def test_a_revived_block_is_recent_again() -> None:
    pool = BlockPool(3)
    a, b, c = pool.allocate(3)
    pool.register(a, b"a")
    pool.release([a])
    pool.release([b])
    pool.acquire([a])
    assert pool.num_free == 1
    pool.release([a])
    pool.release([c])
    assert pool.allocate(3) == [b, a, c]


def test_a_shared_block_is_free_after_its_last_release() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.num_free == 0
    pool.check([blocks])
    pool.release(blocks)
    assert pool.num_free == 1
    pool.check([])


def test_the_first_block_of_equal_content_stays_the_one_found() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.find_prefix([b"same"]) == [first]
    pool.register(first, b"other")
    assert pool.find_prefix([b"other"]) == []
    pool.check([[first], [second]])


def test_a_chain_ends_at_the_first_block_that_is_not_cached() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"0")
    pool.register(blocks[1], b"2")
    assert pool.find_prefix([b"0", b"1", b"2"]) == blocks[:1]
    assert pool.find_prefix([]) == []


def test_free_blocks_are_counted_among_others() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.release(blocks[1:])
    assert pool.num_free_among(blocks) == 2
    assert pool.num_free_among(blocks[:1]) == 0


def test_hashes_are_of_all_tokens_before() -> None:
    first, other = _hashed(b"", [1, 2]), _hashed(b"", [2, 1])
    assert len({first, other, _hashed(first, [1, 2]), _hashed(other, [1, 2])}) == 4
    assert _hashed(first, [3, 151_551]) == _hashed(first, (3, 151_551))
    # Token boundaries count: 256 is not the bytes 0 and 1.
    assert _hashed(b"", [256]) != _hashed(b"", [0, 1])


def _leak(pool: BlockPool) -> None:
    pool.acquire([0])


def _free_an_owned_block(pool: BlockPool) -> None:
    pool._free[0] = None


def _lose_a_free_block(pool: BlockPool) -> None:
    pool._free.popitem()


def _find_a_forgotten_block(pool: BlockPool) -> None:
    pool._cached[b"ghost"] = 1


def _forget_one_way(pool: BlockPool) -> None:
    del pool._cached[b"full"]


def _swap_hashes(pool: BlockPool) -> None:
    pool._hashes[0] = b"swapped"


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (_leak, "reference counts"),
        (_free_an_owned_block, "free list"),
        (_lose_a_free_block, "free list"),
        (_find_a_forgotten_block, "prefix cache"),
        (_forget_one_way, "prefix cache"),
        (_swap_hashes, "prefix cache"),
    ],
)
def test_check_notices(tamper: Callable[[BlockPool], None], message: str) -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"full")
    pool.check([blocks])
    tamper(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check([blocks])


@pytest.mark.parametrize("owned", [[], [[0]], [[0, 1], [1]], [[0, 1, 2]]])
def test_check_notices_wrong_owners(owned: list[list[int]]) -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check(owned)


class PoolAgainstModel(RuleBasedStateMachine):
    """The model: owners as lists of blocks, free blocks in a list by age, contents in a dict."""

    @initialize(num_blocks=st.integers(1, 8))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.owners: list[list[int]] = []
        self.free = list(range(num_blocks))
        self.contents: dict[int, bytes] = {}

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        if count > len(self.free):
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(count)
            return
        expected, self.free = self.free[:count], self.free[count:]
        for block in expected:
            self.contents.pop(block, None)
        assert self.pool.allocate(count) == expected
        self.owners.append(expected)

    @rule(data=st.data(), content=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def register(self, data: st.DataObject, content: bytes) -> None:
        owned = sorted({block for blocks in self.owners for block in blocks})
        if not owned:
            return
        block = data.draw(st.sampled_from(owned))
        self.pool.register(block, content)
        if content not in self.contents.values():
            self.contents.setdefault(block, content)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if not self.owners:
            return
        blocks = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.pool.release(blocks)
        owned = {block for others in self.owners for block in others}
        self.free += [block for block in reversed(blocks) if block not in owned]

    @rule(chain=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=4, unique=True))
    def find_and_acquire(self, chain: list[bytes]) -> None:
        expected: list[int] = []
        for content in chain:
            holders = [block for block, held in self.contents.items() if held == content]
            if not holders:
                break
            expected += holders
        found = self.pool.find_prefix(chain)
        assert found == expected
        assert self.pool.num_free_among(found) == len(set(found) & set(self.free))
        self.pool.acquire(found)
        self.free = [block for block in self.free if block not in found]
        self.owners.append(found)

    @invariant()
    def is_sound(self) -> None:
        self.pool.check(self.owners)
        assert self.pool.num_free == len(self.free)

    def teardown(self) -> None:
        """Everything released, the blocks come out in the model's order of age."""
        while self.owners:
            blocks = self.owners.pop()
            self.pool.release(blocks)
            owned = {block for others in self.owners for block in others}
            self.free += [block for block in reversed(blocks) if block not in owned]
        assert self.pool.allocate(len(self.free)) == self.free


PoolAgainstModel.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPoolAgainstModel = PoolAgainstModel.TestCase
