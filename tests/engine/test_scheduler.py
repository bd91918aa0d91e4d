from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_runner import VOCABULARY, PagedRunner, next_token

from nybble.engine.block_pool import BlockPool
from nybble.engine.engine import Engine, EngineLimits
from nybble.engine.engine_config import SchedulerConfig
from nybble.engine.messages import Request, SamplingParams, TokenEvent
from nybble.engine.scheduler import Scheduler
from nybble.engine.step import SampledToken

BLOCK_SIZE = 4


@dataclass
class Harness:
    """An engine over a `PagedRunner`, and everything it said."""

    num_blocks: int = 100
    max_num_seqs: int = 8
    budget: int = 64
    enable_prefix_caching: bool = True
    prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    finish_reasons: dict[str, str] = field(default_factory=dict)
    num_cached: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runner = PagedRunner(BLOCK_SIZE)
        config = SchedulerConfig(max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.budget)
        pool = BlockPool(self.num_blocks)
        self.scheduler = Scheduler(config, pool, BLOCK_SIZE, self.enable_prefix_caching)
        limits = EngineLimits(self.num_blocks * BLOCK_SIZE, VOCABULARY, BLOCK_SIZE)
        self.engine = Engine(self.runner, self.scheduler, limits)

    def add(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        max_tokens: int = 4,
        stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids)
        self.engine.add(Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling))
        self.prompts[request_id], self.tokens[request_id] = prompt, []

    def step(self) -> dict[str, int]:
        """Run a step; returns how many tokens each request ran, in the plan's order."""
        num_plans = len(self.runner.plans)
        for event in self.engine.step():
            self._note(event)
        self.engine.check()
        plans = self.runner.plans[num_plans:]
        return {chunk.request_id: len(chunk.token_ids) for plan in plans for chunk in plan.chunks}

    def drain(self, max_steps: int = 1000) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            assert self.step(), "nothing ran although there is work"
        assert not self.engine.has_work
        assert self.engine.stats().num_free_blocks == self.num_blocks

    def assert_right_tokens(self, request_id: str, count: int | None = None) -> None:
        """All `count` tokens are those that the runner gives without batching, paging or sharing."""
        context = list(self.prompts[request_id])
        for token_id in self.tokens[request_id]:
            assert token_id == next_token(context)
            context.append(token_id)
        assert count is None or len(self.tokens[request_id]) == count

    def waiting_ids(self) -> list[str]:
        return [sequence.request_id for sequence in self.scheduler.waiting]

    def running_ids(self) -> list[str]:
        return [sequence.request_id for sequence in self.scheduler.running]

    def _note(self, event: TokenEvent) -> None:
        assert event.request_id not in self.finished
        self.tokens[event.request_id].append(event.token_id)
        self.num_cached[event.request_id] = event.num_cached_tokens
        if event.finish_reason is not None:
            self.finished.append(event.request_id)
            self.finish_reasons[event.request_id] = event.finish_reason


def _prompt(length: int, first: int = 0) -> tuple[int, ...]:
    """Different from the first token on for different `first`."""
    return tuple((first + i // 3 * 5 + i) % VOCABULARY for i in range(length))


# Batching.


def test_one_request_from_start_to_end() -> None:
    harness = Harness()
    harness.add("a", _prompt(10), max_tokens=3)
    assert [harness.step() for _ in range(3)] == [{"a": 10}, {"a": 1}, {"a": 1}]
    assert harness.finished == ["a"]
    harness.assert_right_tokens("a", 3)
    assert harness.step() == {}
    harness.drain()


def test_prompts_share_a_step_up_to_the_budget() -> None:
    harness = Harness(budget=20)
    for name, length in (("a", 7), ("b", 9), ("c", 9), ("d", 2)):
        harness.add(name, _prompt(length, ord(name)))
    # d does not overtake c, of which only a part fits.
    assert harness.step() == {"a": 7, "b": 9, "c": 4}
    assert harness.step() == {"a": 1, "b": 1, "c": 5, "d": 2}


def test_a_long_prompt_is_prefilled_in_chunks_and_sampled_once() -> None:
    harness = Harness(budget=6)
    harness.add("a", _prompt(16), max_tokens=2)
    assert [harness.step() for _ in range(4)] == [{"a": 6}, {"a": 6}, {"a": 4}, {"a": 1}]
    chunks = [plan.chunks[0] for plan in harness.runner.plans]
    assert [chunk.start for chunk in chunks] == [0, 6, 12, 16]
    assert [chunk.sampling is not None for chunk in chunks] == [False, False, True, True]
    harness.assert_right_tokens("a", 2)


def test_decodes_come_first_and_prefill_gets_the_rest() -> None:
    harness = Harness(budget=5)
    harness.add("long", _prompt(23, 1))
    harness.step()
    harness.add("short", _prompt(2, 2))
    for _ in range(4):
        harness.step()
    assert harness.running_ids() == ["long", "short"]
    harness.add("late", _prompt(9, 3))
    assert list(harness.step().items()) == [("long", 1), ("short", 1), ("late", 3)]
    harness.engine.abort("long")
    harness.add("later", _prompt(3, 4))
    assert list(harness.step().items()) == [("short", 1), ("late", 4)]
    assert list(harness.step().items()) == [("short", 1), ("late", 2), ("later", 2)]
    assert list(harness.step().items()) == [("late", 1), ("later", 1)]


def test_a_decode_is_planned_before_a_prompt_that_was_admitted_earlier() -> None:
    harness = Harness(budget=8)
    harness.add("a", _prompt(4, 1), max_tokens=20)
    harness.step()
    harness.add("long", _prompt(40, 2))
    harness.step()
    harness.scheduler.running.reverse()
    assert list(harness.step().items()) == [("a", 1), ("long", 7)]


def test_admission_is_in_order_of_arrival_and_at_most_max_num_seqs() -> None:
    harness = Harness(max_num_seqs=2)
    for name in "abcd":
        harness.add(name, _prompt(3, ord(name)), max_tokens=1 + (name == "a"))
    assert list(harness.step()) == ["a", "b"]
    assert (harness.running_ids(), harness.waiting_ids()) == (["a"], ["c", "d"])
    assert list(harness.step()) == ["a", "c"]
    assert list(harness.step()) == ["d"]
    assert harness.finished == ["b", "a", "c", "d"]


def test_a_request_that_does_not_fit_yet_is_not_overtaken() -> None:
    harness = Harness(num_blocks=5)
    harness.add("a", _prompt(12, 1))
    harness.step()
    harness.add("big", _prompt(16, 2), max_tokens=1)
    harness.add("small", _prompt(1, 3), max_tokens=1)
    assert list(harness.step()) == ["a"]
    assert harness.waiting_ids() == ["big", "small"]
    harness.drain()
    assert harness.finished == ["a", "big", "small"]


# Preemption.


def test_the_last_admitted_is_preempted_and_all_finish() -> None:
    harness = Harness(num_blocks=6)
    for name in "abc":
        harness.add(name, _prompt(8, ord(name)), max_tokens=6)
    assert list(harness.step()) == ["a", "b", "c"]
    assert harness.engine.stats().num_free_blocks == 0
    assert list(harness.step()) == ["a", "b"]  # c's blocks went to a and b; nobody is admitted
    assert (harness.running_ids(), harness.waiting_ids()) == (["a", "b"], ["c"])
    assert harness.engine.stats().num_preemptions == 1
    assert harness.scheduler.waiting[0].num_computed == 0
    harness.drain()
    assert harness.finished == ["a", "b", "c"]
    for name in "abc":
        harness.assert_right_tokens(name, 6)


def test_preempted_requests_keep_their_order_before_newer_ones() -> None:
    harness = Harness(num_blocks=4, enable_prefix_caching=False)
    for name in "abcd":
        harness.add(name, _prompt(4, ord(name)), max_tokens=9)
    harness.step()
    harness.add("new", _prompt(1, 9))
    # Each needs a second block: d gives one to a, c one to b.
    assert list(harness.step()) == ["a", "b"]
    assert harness.waiting_ids() == ["c", "d", "new"]
    harness.drain()
    for name in "abcd":
        harness.assert_right_tokens(name, 9)


def test_a_step_that_preempts_admits_nobody() -> None:
    """Or the victim would come straight back for the blocks that are left, and be preempted again."""
    harness = Harness(num_blocks=6, max_num_seqs=3, budget=3, enable_prefix_caching=False)
    for name, length in (("a", 3), ("b", 3), ("c", 9)):
        harness.add(name, _prompt(length, ord(name)), max_tokens=20 if name != "c" else 1)
    while not harness.engine.stats().num_preemptions:
        plan = harness.step()
    assert harness.waiting_ids() == ["c"]
    assert harness.engine.stats().num_free_blocks > 0
    assert plan == {"a": 1, "b": 1}


def test_a_request_may_have_to_preempt_itself() -> None:
    harness = Harness(num_blocks=3, enable_prefix_caching=False)
    harness.add("a", _prompt(5, 1), max_tokens=3)
    harness.add("b", _prompt(4, 2), max_tokens=3)
    assert list(harness.step()) == ["a", "b"]
    assert list(harness.step()) == ["a"]
    assert harness.waiting_ids() == ["b"]
    harness.drain()
    harness.assert_right_tokens("a", 3)
    harness.assert_right_tokens("b", 3)


def test_a_victim_that_was_planned_already_leaves_the_plan() -> None:
    harness = Harness(num_blocks=8, budget=15)
    harness.add("a", _prompt(4, 1), max_tokens=8)
    harness.step()
    harness.add("long", _prompt(26, 2), max_tokens=1)
    assert harness.step() == {"a": 1, "long": 14}
    # a is planned first, for it decodes, and gives way after: long, now its senior, needs its blocks.
    harness.scheduler.running.reverse()
    assert harness.step() == {"long": 12}
    assert harness.waiting_ids() == ["a"]
    harness.drain()
    harness.assert_right_tokens("a", 8)
    harness.assert_right_tokens("long", 1)


def test_readmission_reuses_the_blocks_that_survived() -> None:
    harness = Harness(num_blocks=7)
    harness.add("a", _prompt(11, 1), max_tokens=4)
    harness.add("b", _prompt(13, 2), max_tokens=4)
    harness.step()
    harness.step()
    assert harness.step() == {"a": 1}
    assert harness.waiting_ids() == ["b"]
    harness.step()
    # b has 15 tokens; its fourth block is gone, of the first three one was reused at most.
    assert harness.finished == ["a"]
    assert harness.step() == {"b": 3}
    harness.drain()
    harness.assert_right_tokens("b", 4)
    assert harness.num_cached["b"] == 0  # at first admission


# Abort.


def _waiting(harness: Harness) -> None:
    harness.add("other", _prompt(5, 1), max_tokens=20)
    harness.step()
    harness.add("x", _prompt(30, 2))


def _mid_prefill(harness: Harness) -> None:
    harness.add("x", _prompt(30, 2))
    harness.step()
    assert harness.running_ids() == ["x"]
    assert harness.tokens["x"] == []


def _decoding(harness: Harness) -> None:
    harness.add("x", _prompt(5, 2), max_tokens=20)
    harness.step()
    harness.step()
    assert len(harness.tokens["x"]) == 2


def _preempted(harness: Harness) -> None:
    harness.add("other", _prompt(7, 1), max_tokens=30)
    harness.step()
    harness.add("x", _prompt(7, 2), max_tokens=30)
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
    harness.add("next", _prompt(9, 3))
    harness.drain()
    assert harness.tokens["x"] == before
    harness.assert_right_tokens("x")
    harness.assert_right_tokens("next", 4)
    assert "x" not in harness.finished


def test_abort_of_the_unknown_or_finished_changes_nothing() -> None:
    harness = Harness()
    harness.add("a", _prompt(5), max_tokens=2)
    harness.engine.abort("nobody")
    harness.drain()
    harness.engine.abort("a")
    assert harness.finished == ["a"]


def test_an_aborted_id_can_be_used_again() -> None:
    harness = Harness(budget=8)
    harness.add("a", _prompt(20, 1))
    harness.step()
    harness.engine.abort("a")
    harness.add("a", _prompt(6, 2), max_tokens=3)
    harness.drain()
    harness.assert_right_tokens("a", 3)


# Prefix cache.


@pytest.mark.parametrize(("length", "hit"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_an_equal_prompt_hits_all_full_blocks_but_the_last_token(length: int, hit: int) -> None:
    harness = Harness()
    for name in ("first", "second"):
        harness.add(name, _prompt(length))
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
    harness.add("first", _prompt(6), max_tokens=7)
    harness.drain()
    harness.add("second", (*_prompt(6), *harness.tokens["first"], 1, 2))
    harness.drain()
    # The last token of the answer was never run: 12 of its 13 tokens are cached, three blocks.
    assert harness.num_cached["second"] == 12
    harness.assert_right_tokens("second", 4)


def test_a_running_prompt_is_shared() -> None:
    harness = Harness(num_blocks=7)
    harness.add("first", _prompt(17), max_tokens=3)
    harness.step()
    harness.add("second", _prompt(17), max_tokens=2)
    assert harness.step() == {"first": 1, "second": 1}
    assert harness.engine.stats().num_free_blocks == 1
    harness.drain()
    harness.assert_right_tokens("second", 2)


def test_a_running_prefill_is_shared_as_far_as_it_has_come() -> None:
    harness = Harness(budget=10)
    harness.add("first", _prompt(15))
    harness.step()
    harness.add("second", _prompt(15))
    assert harness.step() == {"first": 5, "second": 5}
    assert harness.step() == {"first": 1, "second": 2}
    assert harness.num_cached["second"] == 8
    harness.assert_right_tokens("second")


def test_cached_blocks_do_not_count_twice_as_free() -> None:
    """Three cached and free blocks of four cannot also be allocated for the rest of the prompt."""
    harness = Harness(num_blocks=4)
    harness.add("first", _prompt(12), max_tokens=1)
    harness.drain()
    harness.add("second", (*_prompt(12), 1, 1), max_tokens=2)
    assert harness.step() == {"second": 2}
    assert harness.num_cached["second"] == 12
    harness.drain()
    harness.add("hog", (7,), max_tokens=9)
    harness.step()
    harness.add("third", (*_prompt(12), 1, 1, 2), max_tokens=1)
    assert harness.step() == {"hog": 1}
    harness.drain()
    harness.assert_right_tokens("third", 1)


def test_without_prefix_caching_nothing_is_shared() -> None:
    harness = Harness(enable_prefix_caching=False)
    for name in ("first", "second"):
        harness.add(name, _prompt(13))
        assert harness.step() == {name: 13}
        harness.drain()
    assert harness.num_cached == {"first": 0, "second": 0}


# Drafts.


def _decoding_with(drafts: tuple[int, ...], **options: Any) -> Harness:
    """x has 7 tokens, the last of them sampled and yet to be run."""
    harness = Harness(**options)
    harness.add("x", _prompt(6, 1), max_tokens=10)
    harness.step()
    harness.scheduler.running[0].drafts = drafts
    return harness


def _future(count: int) -> tuple[int, ...]:
    """What comes after the 7 tokens."""
    harness = Harness()
    harness.add("x", _prompt(6, 1), max_tokens=count + 1)
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
    context = (*_prompt(6, 1), *harness.tokens["x"])
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
    harness.add("x", _prompt(6, 1), max_tokens=10, stop_token_ids=(stop,))
    harness.step()
    assert not harness.finished
    harness.scheduler.running[0].drafts = future[:6]
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
    harness.add("y", _prompt(5, 2), max_tokens=20)
    harness.step()
    for sequence in harness.scheduler.running:
        sequence.drafts = (1, 2, 3, 4, 5)
    assert harness.step() == {"x": 6, "y": 3}


def test_nobody_gives_way_for_drafts() -> None:
    harness = _decoding_with((), num_blocks=4)
    harness.add("y", _prompt(7, 2), max_tokens=2)
    harness.step()  # all four blocks are taken
    assert harness.engine.stats().num_free_blocks == 0
    for sequence in harness.scheduler.running:
        sequence.drafts = (1, 1, 1)
    assert harness.step() == {"x": 1, "y": 1}
    assert harness.engine.stats().num_preemptions == 0


def test_preemption_forgets_drafts() -> None:
    harness = Harness(num_blocks=4, enable_prefix_caching=False)
    for name in "ab":
        harness.add(name, _prompt(8, ord(name)), max_tokens=6)
    harness.step()
    for sequence in harness.scheduler.running:
        sequence.drafts = (1, 2)
    assert list(harness.step()) == ["a"]
    (waiting,) = harness.scheduler.waiting
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
        harness.add(name, _prompt(5, ord(name)))
    harness.step()
    stats = harness.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.num_blocks, stats.num_free_blocks, stats.num_preemptions) == (20, 16, 0)


def test_check_notices_blocks_of_a_waiting_sequence() -> None:
    harness = Harness()
    harness.add("a", _prompt(5))
    harness.scheduler.waiting[0].blocks = [3]
    with pytest.raises(AssertionError, match="waiting sequence owns blocks"):
        harness.engine.check()


def test_check_notices_a_lost_block() -> None:
    harness = Harness()
    harness.add("a", _prompt(5))
    harness.step()
    harness.scheduler.running[0].blocks.pop()
    with pytest.raises(AssertionError, match="reference counts"):
        harness.engine.check()


# Everything at once.


@dataclass(frozen=True)
class Arrival:
    prompt: tuple[int, ...]
    max_tokens: int


# Few tokens and common beginnings, so that prefixes are shared often.
_prompts = st.tuples(
    st.sampled_from([(), _prompt(4), _prompt(9), _prompt(14)]),
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
