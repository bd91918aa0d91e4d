from __future__ import annotations

from array import array

from nybble.engine.messages import CacheExplanation
from nybble.engine.scheduling.cache_record import CacheRecord


def _explain(record: CacheRecord, block_hash: bytes, *tokens: int) -> CacheExplanation:
    return record.explain(100, b"before", block_hash, tokens)


def test_the_longest_beginning_among_the_blocks_that_follow() -> None:
    record = CacheRecord(max_forgotten=4)
    record.registered(1, b"before", array("i", (1, 2, 9, 9)))
    record.registered(2, b"before", array("i", (1, 9, 3, 4)))
    record.registered(3, b"elsewhere", array("i", (1, 2, 3, 9)))
    found = _explain(record, b"h", 1, 2, 3, 4)
    assert found == CacheExplanation(reason="different_token", first_differing_token=102)
    record.forgotten(1, b"first")
    assert _explain(record, b"h", 1, 2, 3, 4).first_differing_token == 101
    record.forgotten(2, b"second")
    assert _explain(record, b"h", 1, 2, 3, 4) == CacheExplanation(reason="never_seen")


def test_as_many_hashes_are_remembered_as_allowed_the_oldest_go_first() -> None:
    record = CacheRecord(max_forgotten=2)
    for block, block_hash in enumerate((b"a", b"b", b"a", b"c")):
        record.registered(block, b"before", array("i", (1,)))
        record.forgotten(block, block_hash)
    reasons = [_explain(record, block_hash, 2).reason for block_hash in (b"a", b"b", b"c")]
    assert reasons == ["evicted", "never_seen", "evicted"]


def test_a_block_that_was_never_registered_may_be_forgotten() -> None:
    record = CacheRecord(max_forgotten=2)
    record.forgotten(7, b"x")
    assert _explain(record, b"x", 1).reason == "evicted"
