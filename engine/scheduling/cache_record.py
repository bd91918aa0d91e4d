"""What the prefix cache holds and held, to explain why it does not have more of a prompt.

Kept for every registered block are its tokens and the hash of the block before it; of overwritten blocks
their hashes, so many at most as there are blocks. All else is worked out when somebody asks, by a look at
every registered block.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from nybble.engine.messages import CacheExplanation


class CacheRecord:
    def __init__(self, max_forgotten: int) -> None:
        self._contents: dict[int, tuple[bytes, array[int]]] = {}  # block -> hash of the one before, tokens
        self._forgotten: OrderedDict[bytes, None] = OrderedDict()  # hashes
        self._max_forgotten = max_forgotten

    def registered(self, block: int, hash_before: bytes, token_ids: array[int]) -> None:
        self._contents[block] = hash_before, token_ids

    def forgotten(self, block: int, block_hash: bytes) -> None:
        self._contents.pop(block, None)
        self._forgotten[block_hash] = None
        self._forgotten.move_to_end(block_hash)
        if len(self._forgotten) > self._max_forgotten:
            self._forgotten.popitem(last=False)

    def explain(
        self, start: int, hash_before: bytes, block_hash: bytes, token_ids: Sequence[int]
    ) -> CacheExplanation:
        """Why a prompt's block that starts at position `start` is not cached, though all before it are."""
        if block_hash in self._forgotten:
            return CacheExplanation(reason="evicted")
        alike = [_num_equal(token_ids, other) for other in self._followers(hash_before)]
        if not alike:
            return CacheExplanation(reason="never_seen")
        return CacheExplanation(reason="different_token", first_differing_token=start + max(alike))

    def _followers(self, hash_before: bytes) -> Iterator[array[int]]:
        """Tokens of the registered blocks that come after one."""
        return (token_ids for before, token_ids in self._contents.values() if before == hash_before)


def _num_equal(token_ids: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two blocks begin with alike."""
    pairs = enumerate(zip(token_ids, other, strict=True))
    return next((number for number, (own, its) in pairs if own != its), len(token_ids))
