"""Which blocks of a sequence are cached already, which become so, and why others are not."""

from __future__ import annotations

from nybble.engine.messages import CacheExplanation
from nybble.engine.scheduling.block_pool import BlockPool
from nybble.engine.scheduling.sequence import Sequence


class PrefixCache:
    """What the block pool remembers, asked about sequences. Switched off, it finds and keeps nothing."""

    def __init__(self, pool: BlockPool, block_size: int, is_on: bool) -> None:
        self._pool = pool
        self._block_size = block_size
        self._is_on = is_on

    def find(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence, short of the first token whose logits are wanted."""
        if not self._is_on:
            return []
        return self._pool.find_prefix(sequence.block_hashes(self._num_findable(sequence)))

    def keep(self, sequence: Sequence, start: int) -> None:
        """Make findable the blocks that were filled since position `start`."""
        first, end = start // self._block_size, sequence.num_full_blocks
        if not self._is_on or end <= first:
            return
        for index, block in enumerate(sequence.blocks.array[first:end].tolist(), first):
            if self._pool.register(block, sequence.block_hash(index)):
                self._pool.record.registered(
                    block, sequence.hash_before(index), sequence.tokens_of_block(index)
                )

    def explain(self, sequence: Sequence, num_found: int) -> CacheExplanation:
        """Why no more than its first `num_found` blocks were found."""
        if not self._is_on:
            return CacheExplanation(reason="off")
        if num_found == self._num_findable(sequence):
            return CacheExplanation(reason="last_block")
        return self._pool.record.explain(
            num_found * self._block_size,
            sequence.hash_before(num_found),
            sequence.block_hash(num_found),
            sequence.tokens_of_block(num_found),
        )

    def _num_findable(self, sequence: Sequence) -> int:
        return sequence.num_reusable // self._block_size
