from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from engine_harness import Harness, distinct_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_runner import VOCABULARY

from nybble.engine.scheduling.block_table import BlockTable
from nybble.engine.scheduling.step import SampledToken

# Batching.


def test_one_request_from_start_to_end() -> None:
    harness = Harness()
    harness.add("a", distinct_prompt(10), max_tokens=3)
    assert [harness.step() for _ in range(3)] == [{"a": 10}, {"a": 1}, {"a": 1}]
    assert harness.finished == ["a"]
    harness.assert_right_tokens("a", 3)
    assert harness.step() == {}
    harness.drain()


def test_prompts_share_a_step_up_to_the_budget() -> None:
    harness = Harness(budget=20)
    for name, length in (("a", 7), ("b", 9), ("c", 9), ("d", 2)):
        harness.add(name, distinct_prompt(length, ord(name)))
    # In turns of 5 tokens, alternately of the oldest and of the shortest: a, a, b, d, b, c.
    assert harness.step() == {"a": 7, "b": 9, "d": 2, "c": 2}
    assert harness.step() == {"a": 1, "b": 1, "d": 1, "c": 7}


def test_a_long_prompt_is_prefilled_in_chunks_and_sampled_once() -> None:
    harness = Harness(budget=6)
    harness.add("a", distinct_prompt(16), max_tokens=2)
    assert [harness.step() for _ in range(4)] == [{"a": 6}, {"a": 6}, {"a": 4}, {"a": 1}]
    chunks = [plan.chunks[0] for plan in harness.runner.plans]
    assert [chunk.start for chunk in chunks] == [0, 6, 12, 16]
    assert [chunk.sampling is not None for chunk in chunks] == [False, False, True, True]
    harness.assert_right_tokens("a", 2)


def test_decodes_come_first_and_prefill_gets_the_rest() -> None:
    harness = Harness(budget=8)
    harness.add("first", distinct_prompt(5, 1), max_tokens=20)
    harness.step()
    harness.add("second", distinct_prompt(2, 2), max_tokens=20)
    harness.step()
    harness.add("late", distinct_prompt(9, 3))
    assert list(harness.step().items()) == [("first", 1), ("second", 1), ("late", 6)]
    harness.add("later", distinct_prompt(4, 4))
    # late has 3 tokens left, so it is both the oldest and the shortest.
    assert list(harness.step().items()) == [("first", 1), ("second", 1), ("late", 3), ("later", 3)]
    assert list(harness.step().items()) == [("first", 1), ("second", 1), ("late", 1), ("later", 1)]


def test_a_decode_is_planned_before_a_prompt_that_was_admitted_earlier() -> None:
    harness = Harness(budget=8)
    harness.add("long", distinct_prompt(40, 1))
    harness.add("short", distinct_prompt(3, 2), max_tokens=20)
    assert harness.step() == {"long": 5, "short": 3}
    assert list(harness.step().items()) == [("short", 1), ("long", 7)]


def test_decodes_that_leave_prompts_too_little_go_by_rotation() -> None:
    harness = Harness(budget=8, max_num_seqs=8)
    for name in "abcdefg":
        harness.add(name, distinct_prompt(1, ord(name)), max_tokens=20)
    harness.step()
    harness.add("long", distinct_prompt(40, 1), max_tokens=1)
    decodes = [tuple(name for name in harness.step() if name != "long") for _ in range(7)]
    assert decodes[0] == tuple("abcdef")
    assert decodes[1] == tuple("gabcde")
    assert all(len(names) == 6 for names in decodes)
    assert {name: sum(name in names for names in decodes) for name in "abcdefg"} == dict.fromkeys(
        "abcdefg", 6
    )
    for name in "abcdefg":
        harness.assert_right_tokens(name)


def test_admission_is_in_order_of_arrival_and_at_most_max_num_seqs() -> None:
    harness = Harness(max_num_seqs=2)
    for name in "abcd":
        harness.add(name, distinct_prompt(3, ord(name)), max_tokens=1 + (name == "a"))
    assert list(harness.step()) == ["a", "b"]
    assert (harness.running_ids(), harness.waiting_ids()) == (["a"], ["c", "d"])
    assert list(harness.step()) == ["a", "c"]
    assert list(harness.step()) == ["d"]
    assert harness.finished == ["b", "a", "c", "d"]


def test_a_request_that_does_not_fit_yet_is_not_overtaken() -> None:
    harness = Harness(num_blocks=5)
    harness.add("a", distinct_prompt(12, 1))
    harness.step()
    harness.add("big", distinct_prompt(16, 2), max_tokens=1)
    harness.add("small", distinct_prompt(1, 3), max_tokens=1)
    assert list(harness.step()) == ["a"]
    assert harness.waiting_ids() == ["big", "small"]
    harness.drain()
    assert harness.finished == ["a", "big", "small"]


# Preemption.


def test_the_last_to_arrive_is_preempted_and_all_finish() -> None:
    harness = Harness(num_blocks=8)
    for name in "abc":
        harness.add(name, distinct_prompt(8, ord(name)), max_tokens=9)
    assert list(harness.step()) == ["a", "b", "c"]
    assert harness.engine.stats().num_free_blocks == 2
    assert list(harness.step()) == ["a", "b"]  # c needs a third block as they do; nobody is admitted
    assert (harness.running_ids(), harness.waiting_ids()) == (["a", "b"], ["c"])
    assert harness.engine.stats().num_preemptions == 1
    assert next(harness.scheduler.waiting()).num_computed == 0
    harness.drain()
    assert harness.finished == ["a", "b", "c"]
    for name in "abc":
        harness.assert_right_tokens(name, 9)


def test_the_worst_priority_is_preempted_first() -> None:
    harness = Harness(num_blocks=8)
    for name, priority in (("a", 2), ("b", 1), ("c", 1)):
        harness.add(name, distinct_prompt(8, ord(name)), max_tokens=9, priority=priority)
    assert list(harness.step()) == ["b", "c", "a"]
    assert list(harness.step()) == ["b", "c"]
    assert harness.waiting_ids() == ["a"]


def test_preempted_requests_keep_their_order_before_newer_ones() -> None:
    harness = Harness(num_blocks=8, enable_prefix_caching=False)
    for name in "abcd":
        harness.add(name, distinct_prompt(4, ord(name)), max_tokens=9)
    harness.step()
    assert list(harness.step()) == ["a", "b", "c", "d"]
    harness.add("new", distinct_prompt(1, 9))
    # Each has two blocks of eight tokens; in the step when all want a third one, d gives to a, c to b.
    assert list(harness.run_until_preemption()) == ["a", "b"]
    assert harness.waiting_ids() == ["c", "d", "new"]
    while "new" in harness.waiting_ids():
        harness.step()
    assert {"c", "d"}.isdisjoint(harness.waiting_ids())
    harness.drain()
    for name in "abcd":
        harness.assert_right_tokens(name, 9)


def test_a_step_that_preempts_admits_nobody() -> None:
    """Or the victim would come straight back for the blocks that are left, and be preempted again."""
    harness = Harness(num_blocks=9, max_num_seqs=3, enable_prefix_caching=False)
    for name, length in (("a", 8), ("b", 8), ("c", 16)):
        harness.add(name, distinct_prompt(length, ord(name)), max_tokens=8)
    harness.step()
    assert list(harness.step()) == ["a", "b"]
    assert harness.waiting_ids() == ["c"]
    assert harness.engine.stats().num_free_blocks == 3


def test_a_request_may_have_to_preempt_itself() -> None:
    harness = Harness(num_blocks=6, enable_prefix_caching=False)
    harness.add("a", distinct_prompt(8, 1), max_tokens=3)
    harness.add("b", distinct_prompt(12, 2), max_tokens=3)
    assert list(harness.step()) == ["a", "b"]
    assert list(harness.step()) == ["a"]  # which took the last block
    assert harness.waiting_ids() == ["b"]
    harness.drain()
    harness.assert_right_tokens("a", 3)
    harness.assert_right_tokens("b", 3)


def test_a_victim_that_was_planned_already_leaves_the_plan() -> None:
    harness = Harness(num_blocks=6)
    harness.add("a", distinct_prompt(7, 1), max_tokens=9, priority=1)
    harness.step()
    harness.add("b", distinct_prompt(12, 2), max_tokens=8)
    assert list(harness.step()) == ["a", "b"]
    # a comes first, as it was admitted first; then b needs the block that a has.
    assert harness.step() == {"b": 1}
    assert harness.waiting_ids() == ["a"]
    harness.drain()
    harness.assert_right_tokens("a", 9)
    harness.assert_right_tokens("b", 8)


def test_readmission_reuses_the_blocks_that_survived() -> None:
    harness = Harness(num_blocks=8)
    harness.add("a", distinct_prompt(11, 1), max_tokens=6)
    harness.add("b", distinct_prompt(13, 2), max_tokens=6)
    harness.run_until_preemption()
    assert harness.waiting_ids() == ["b"]
    while "a" not in harness.finished:
        harness.step()
    num_tokens = 13 + len(harness.tokens["b"])
    (count,) = harness.step().values()
    assert count < num_tokens - 8  # of its four full blocks a has taken one
    harness.drain()
    harness.assert_right_tokens("b", 6)
    assert harness.num_cached["b"] == 0  # at first admission


# Abort.


def _waiting(harness: Harness) -> None:
    harness.add("other", distinct_prompt(5, 1), max_tokens=20)
    harness.step()
    harness.add("x", distinct_prompt(30, 2))


def _mid_prefill(harness: Harness) -> None:
    harness.add("x", distinct_prompt(30, 2))
    harness.step()
    assert harness.running_ids() == ["x"]
    assert harness.tokens["x"] == []


def _decoding(harness: Harness) -> None:
    harness.add("x", distinct_prompt(5, 2), max_tokens=20)
    harness.step()
    harness.step()
    assert len(harness.tokens["x"]) == 2


def _preempted(harness: Harness) -> None:
    harness.add("other", distinct_prompt(7, 1), max_tokens=30)
    harness.step()
    harness.add("x", distinct_prompt(7, 2), max_tokens=30)
    while "x" not in harness.waiting_ids() or not harness.tokens["x"]:
        harness.step()


@pytest.mark.parametrize("prepare", [_waiting, _mid_prefill, _decoding, _preempted])
def test_abort_frees_everything_and_ends_the_events(prepare: Callable[[Harness], None]) -> None:
    harness = Harness(num_blocks=10, budget=8)
    prepare(harness)
    before = list(harness.tokens["x"])
    harness.engine.abort("x")
    harness.engine.check()
    assert "x" not in harness.running_ids() + harness.waiting_ids()
    harness.add("next", distinct_prompt(9, 3))
    harness.drain()
    assert harness.tokens["x"] == before
    harness.assert_right_tokens("x")
    harness.assert_right_tokens("next", 4)
    assert "x" not in harness.finished


def test_abort_of_the_unknown_or_finished_changes_nothing() -> None:
    harness = Harness()
    harness.add("a", distinct_prompt(5), max_tokens=2)
    harness.engine.abort("nobody")
    harness.drain()
    harness.engine.abort("a")
    assert harness.finished == ["a"]


def test_an_aborted_id_can_be_used_again() -> None:
    harness = Harness(budget=8)
    harness.add("a", distinct_prompt(20, 1))
    harness.step()
    harness.engine.abort("a")
    harness.add("a", distinct_prompt(6, 2), max_tokens=3)
    harness.drain()
    harness.assert_right_tokens("a", 3)


# Prefix cache.


@pytest.mark.parametrize(("length", "hit"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_an_equal_prompt_hits_all_full_blocks_but_the_last_token(length: int, hit: int) -> None:
    harness = Harness()
    for name in ("first", "second"):
        harness.add(name, distinct_prompt(length))
        assert harness.step() == {name: length - (hit if name == "second" else 0)}
        harness.drain()
    assert harness.num_cached == {"first": 0, "second": hit}
    assert harness.tokens["first"] == harness.tokens["second"]


def test_hits_end_at_the_first_difference() -> None:
    harness = Harness()
    harness.add("first", (1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5))
    harness.drain()
    harness.add("second", (1, 2, 3, 4, 5, 6, 7, 7, 1, 2, 3, 4, 5))
    harness.drain()
    assert harness.num_cached["second"] == 4
    harness.assert_right_tokens("second", 4)


def test_an_answer_is_found_by_the_next_turn() -> None:
    harness = Harness()
    harness.add("first", distinct_prompt(6), max_tokens=7)
    harness.drain()
    harness.add("second", (*distinct_prompt(6), *harness.tokens["first"], 1, 2))
    harness.drain()
    # The last token of the answer was never run: 12 of its 13 tokens are cached, three blocks.
    assert harness.num_cached["second"] == 12
    harness.assert_right_tokens("second", 4)


def test_a_running_prompt_is_shared() -> None:
    harness = Harness(num_blocks=7)
    harness.add("first", distinct_prompt(17), max_tokens=3)
    harness.step()
    harness.add("second", distinct_prompt(17), max_tokens=2)
    assert harness.step() == {"first": 1, "second": 1}
    assert harness.engine.stats().num_free_blocks == 1
    harness.drain()
    harness.assert_right_tokens("second", 2)


def test_a_running_prefill_is_shared_as_far_as_it_has_come() -> None:
    harness = Harness(budget=10)
    harness.add("first", distinct_prompt(15))
    harness.step()
    harness.add("second", distinct_prompt(15))
    assert harness.step() == {"first": 5, "second": 5}
    assert harness.step() == {"first": 1, "second": 2}
    assert harness.num_cached["second"] == 8
    harness.assert_right_tokens("second")


def test_cached_blocks_do_not_count_twice_as_free() -> None:
    """Three cached and free blocks of four cannot also be allocated for the rest of the prompt."""
    harness = Harness(num_blocks=4)
    harness.add("first", distinct_prompt(12), max_tokens=1)
    harness.drain()
    harness.add("second", (*distinct_prompt(12), 1, 1), max_tokens=2)
    assert harness.step() == {"second": 2}
    assert harness.num_cached["second"] == 12
    harness.drain()
    harness.add("hog", (7,), max_tokens=9)
    harness.step()
    harness.add("third", (*distinct_prompt(12), 1, 1, 2), max_tokens=1)
    assert harness.step() == {"hog": 1}
    harness.drain()
    harness.assert_right_tokens("third", 1)


def test_without_prefix_caching_nothing_is_shared() -> None:
    harness = Harness(enable_prefix_caching=False)
    for name in ("first", "second"):
        harness.add(name, distinct_prompt(13))
        assert harness.step() == {name: 13}
        harness.drain()
    assert harness.num_cached == {"first": 0, "second": 0}


# Drafts.


def _decoding_with(drafts: tuple[int, ...], **options: Any) -> Harness:
    """x has 7 tokens, the last of them sampled and yet to be run."""
    harness = Harness(**options)
    harness.add("x", distinct_prompt(6, 1), max_tokens=10)
    harness.step()
    next(iter(harness.scheduler.running)).drafts = drafts
    return harness


def _future(count: int) -> tuple[int, ...]:
    """What comes after the 7 tokens."""
    harness = Harness()
    harness.add("x", distinct_prompt(6, 1), max_tokens=count + 1)
    harness.drain()
    return tuple(harness.tokens["x"][1:])


def _wrong(token_id: int) -> int:
    return (token_id + 1) % VOCABULARY


@pytest.mark.parametrize("num_right", range(5))
@pytest.mark.parametrize("num_wrong", range(3))
def test_accepted_drafts_are_appended_with_the_next_token(num_right: int, num_wrong: int) -> None:
    future = _future(9)
    drafts = (*future[:num_right], *map(_wrong, future[num_right:][:num_wrong]))
    harness = _decoding_with(drafts)
    assert harness.step() == {"x": 1 + len(drafts)}
    (sequence,) = harness.scheduler.running
    assert harness.tokens["x"][1:] == list(future[: num_right + 1])
    assert (sequence.num_computed, sequence.num_uncomputed, sequence.drafts) == (7 + num_right, 1, ())
    (chunk,) = harness.runner.plans[-1].chunks
    assert (chunk.start, chunk.num_drafts, tuple(chunk.token_ids[1:])) == (6, len(drafts), drafts)
    harness.drain()
    harness.assert_right_tokens("x", 10)


def test_only_accepted_tokens_enter_the_prefix_cache() -> None:
    future = _future(9)
    harness = _decoding_with((*future[:2], *map(_wrong, future[2:6])))
    harness.step()  # 13 slots are written, 9 of them for good
    harness.engine.abort("x")
    context = (*distinct_prompt(6, 1), *harness.tokens["x"])
    harness.add("accepted", (*context[:9], 0))
    harness.add("drafted", (*context[:9], *map(_wrong, future[2:6])))
    harness.drain()
    assert harness.num_cached["accepted"] == harness.num_cached["drafted"] == 8
    harness.assert_right_tokens("drafted", 4)


def test_a_stop_token_among_the_drafts_ends_there() -> None:
    future = _future(9)
    stop = future[2]
    end = future.index(stop)
    harness = Harness()
    harness.add("x", distinct_prompt(6, 1), max_tokens=10, stop_token_ids=(stop,))
    harness.step()
    assert not harness.finished
    next(iter(harness.scheduler.running)).drafts = future[:6]
    assert harness.step() == {"x": 7}
    assert harness.tokens["x"][1:] == list(future[: end + 1])
    assert harness.finish_reasons["x"] == "stop"
    assert not harness.engine.has_work


def test_drafts_do_not_exceed_max_tokens() -> None:
    harness = _decoding_with(_future(15))
    assert harness.step() == {"x": 9}  # after the first of 10 tokens, 8 can be accepted and one follows
    assert harness.finish_reasons["x"] == "length"
    harness.assert_right_tokens("x", 10)


def test_drafts_take_what_decodes_leave_of_the_budget() -> None:
    harness = _decoding_with((), budget=9)
    harness.add("y", distinct_prompt(5, 2), max_tokens=20)
    harness.step()
    for sequence in harness.scheduler.running:
        sequence.drafts = (1, 2, 3, 4, 5)
    assert harness.step() == {"x": 6, "y": 3}


def test_nobody_gives_way_for_drafts() -> None:
    harness = _decoding_with((), num_blocks=5)
    harness.add("y", distinct_prompt(7, 2), max_tokens=3)
    harness.step()
    assert harness.engine.stats().num_free_blocks == 1
    for sequence in harness.scheduler.running:
        sequence.drafts = (1, 1, 1)
    assert harness.step() == {"x": 4, "y": 1}
    assert harness.engine.stats().num_preemptions == 0


def test_preemption_forgets_drafts() -> None:
    harness = Harness(num_blocks=4, enable_prefix_caching=False)
    for name in "ab":
        harness.add(name, distinct_prompt(8, ord(name)), max_tokens=6)
    harness.step()
    for sequence in harness.scheduler.running:
        sequence.drafts = (1, 2)
    assert list(harness.step()) == ["a"]
    (waiting,) = harness.scheduler.waiting()
    assert (waiting.request_id, waiting.drafts) == ("b", ())
    harness.drain()
    harness.assert_right_tokens("b", 6)


@pytest.mark.parametrize("count", [0, 3])
def test_a_runner_that_answers_too_few_or_too_many_is_an_error(count: int) -> None:
    harness = _decoding_with((1,))
    plan = harness.scheduler.schedule()
    with pytest.raises(ValueError, match=f"{count} tokens for 1 drafts of x"):
        harness.scheduler.update(plan, [(SampledToken(1, None),) * count])


def test_a_runner_that_forgets_a_sequence_is_an_error() -> None:
    harness = _decoding_with(())
    with pytest.raises(ValueError, match="shorter"):
        harness.scheduler.update(harness.scheduler.schedule(), [])


# Statistics and checks.


def test_stats_count() -> None:
    harness = Harness(num_blocks=20, max_num_seqs=2)
    for name in "abc":
        harness.add(name, distinct_prompt(5, ord(name)))
    harness.step()
    stats = harness.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.num_blocks, stats.num_free_blocks, stats.num_preemptions) == (20, 16, 0)


def test_check_notices_blocks_of_a_waiting_sequence() -> None:
    harness = Harness()
    harness.add("a", distinct_prompt(5))
    next(harness.scheduler.waiting()).blocks.extend([3])
    with pytest.raises(AssertionError, match="waiting sequence owns blocks"):
        harness.engine.check()


def test_check_notices_a_lost_block() -> None:
    harness = Harness()
    harness.add("a", distinct_prompt(5))
    harness.step()
    next(iter(harness.scheduler.running)).blocks = BlockTable()
    with pytest.raises(AssertionError, match="reference counts"):
        harness.engine.check()


# Everything at once.


@dataclass(frozen=True)
class Arrival:
    prompt: tuple[int, ...]
    max_tokens: int


# Few tokens and common beginnings, so that prefixes are shared often.
_prompts = st.tuples(
    st.sampled_from([(), distinct_prompt(4), distinct_prompt(9), distinct_prompt(14)]),
    st.lists(st.integers(0, 1), min_size=1, max_size=10).map(tuple),
).map(lambda parts: parts[0] + parts[1])
_arrivals = st.builds(Arrival, _prompts, st.integers(1, 9))
_actions = st.one_of(_arrivals, st.just("step"), st.just("step"), st.integers(0, 20))  # a number aborts


@settings(max_examples=300, deadline=None)
@given(
    actions=st.lists(_actions, max_size=40),
    num_blocks=st.integers(9, 16),
    max_num_seqs=st.integers(1, 6),
    extra_budget=st.integers(0, 20),
    enable_prefix_caching=st.booleans(),
)
def test_no_schedule_changes_a_token(
    actions: list[Arrival | str | int],
    num_blocks: int,
    max_num_seqs: int,
    extra_budget: int,
    enable_prefix_caching: bool,
) -> None:
    budget = max_num_seqs + extra_budget
    harness = Harness(num_blocks, max_num_seqs, budget, enable_prefix_caching)
    arrivals: list[Arrival] = []
    aborted: set[str] = set()
    for action in actions:
        if isinstance(action, Arrival):
            harness.add(str(len(arrivals)), action.prompt, action.max_tokens)
            arrivals.append(action)
        elif isinstance(action, int):
            harness.engine.abort(str(action))
            harness.engine.check()
            if action < len(arrivals) and str(action) not in harness.finished:
                aborted.add(str(action))
        else:
            harness.step()
    harness.drain()
    for number, arrival in enumerate(arrivals):
        name = str(number)
        assert (name in harness.finished) != (name in aborted)
        harness.assert_right_tokens(name, None if name in aborted else arrival.max_tokens)
    for plan in harness.runner.plans:
        assert 0 < plan.num_tokens <= budget
        assert len(plan.chunks) <= max_num_seqs
