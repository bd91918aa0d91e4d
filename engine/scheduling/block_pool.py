"""Ownership of KV-cache blocks: free, in use (by reference count), and remembered by content.

A full block is registered under a hash of its tokens chained to the hash of the block before it, so
that equal hashes mean equal prefixes. When its last user lets go, it joins the free list but stays
findable until its turn to be overwritten comes: least recently freed first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from nybble.engine.scheduling.cache_record import CacheRecord


class OutOfBlocksError(Exception):
    """More blocks were asked for than are free; nothing was taken."""


def hash_block(previous: bytes, token_ids: array[int]) -> bytes:
    """Content hash of a full block: of its tokens (int32) and, through `previous`, of all before it.

    128 bits of BLAKE2b: a collision would serve one user another's context, so it must not happen.
    """
    return hashlib.blake2b(previous + token_ids.tobytes(), digest_size=16).digest()


def hash_salt(salt: str) -> bytes:
    """What comes before the first block: chains of different salts have no hash in common."""
    text = salt.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16, person=b"cache salt").digest() if salt else b""


class BlockPool:
    """`num_blocks` blocks, named 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._reference_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hashes: dict[int, bytes] = {}  # block -> hash, for registered blocks
        self._cached: dict[bytes, int] = {}  # hash -> block
        self.record = CacheRecord(max_forgotten=num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def find_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of a chain of hashes. Takes no reference."""
        blocks = []
        for block_hash in hashes:
            block = self._cached.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free, so that taking them leaves fewer to allocate."""
        return sum(block in self._free for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each block, reviving those that were free."""
        for block in blocks:
            self._reference_counts[block] += 1
            self._free.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, forgetting what they held.

        Raises:
            OutOfBlocksError: fewer are free.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._reference_counts[block] = 1
        return blocks

    def register(self, block: int, block_hash: bytes) -> bool:
        """Make a full block findable. The first block with this content stays the one found; False if it is
        another."""
        if block_hash in self._cached or block in self._hashes:
            return False
        self._cached[block_hash] = block
        self._hashes[block] = block_hash
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a sequence, given in order.

        The last block is freed first and so reused first: a prefix is worth more than its tail.
        """
        for block in reversed(blocks):
            self._reference_counts[block] -= 1
            if self._reference_counts[block] == 0:
                self._free[block] = None

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that nothing is lost or shared wrongly, given every sequence's blocks."""
        counts = [0] * self.num_blocks
        for blocks in owned:
            for block in blocks:
                counts[block] += 1
        if counts != self._reference_counts:
            raise AssertionError("reference counts differ from the blocks that sequences own")
        if set(self._free) != {b for b, count in enumerate(counts) if count == 0}:
            raise AssertionError("the free list is not the set of unowned blocks")
        if {block: h for h, block in self._cached.items()} != self._hashes:
            raise AssertionError("the prefix cache and its inverse disagree")

    def _forget(self, block: int) -> None:
        block_hash = self._hashes.pop(block, None)
        if block_hash is not None:
            del self._cached[block_hash]
            self.record.forgotten(block, block_hash)
