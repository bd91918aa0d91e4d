"""The cache blocks of sequences: allocated as they grow, freed together."""

from __future__ import annotations

from collections.abc import Mapping

from nybble.engine.scheduling.block_pool import BlockPool
from nybble.engine.scheduling.block_table import BlockTable
from nybble.engine.scheduling.sequence import Sequence


class SequenceBlocks:
    """What takes blocks from `pool` for sequences, and gives them back."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size

    def count_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self._block_size)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend a sequence's blocks to hold `num_tokens`; False if too few are free."""
        needed = self._missing(sequence, num_tokens)
        if needed > self._pool.num_free:
            return False
        if needed:
            sequence.blocks.extend(self._pool.allocate(needed))
        return True

    def grow_all(self, lengths: Mapping[Sequence, int]) -> bool:
        """`grow` each sequence to hold so many tokens; or none, and False."""
        missing = [self._missing(sequence, num_tokens) for sequence, num_tokens in lengths.items()]
        if sum(missing) > self._pool.num_free:
            return False
        for sequence, count in zip(lengths, missing, strict=True):
            if count:
                sequence.blocks.extend(self._pool.allocate(count))
        return True

    def release(self, sequence: Sequence) -> None:
        """Free all of a sequence's blocks."""
        self._pool.release(sequence.blocks.tolist())
        sequence.blocks = BlockTable()

    def _missing(self, sequence: Sequence, num_tokens: int) -> int:
        return max(self.count_for(num_tokens) - len(sequence.blocks), 0)
