"""Statistics of an engine against what can be counted from outside, under a clock that the test turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from engine_harness import Harness, distinct_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_runner import PagedRunner
from running import random_prompt, request

from nybble.engine.engine import Engine, EngineLimits
from nybble.engine.engine_config import SchedulerConfig
from nybble.engine.engine_stats import Gauges, StatsRecorder
from nybble.engine.histogram import POWERS_OF_TWO, SECONDS, TOKENS
from nybble.engine.messages import HistogramCounts, TokenEvent
from nybble.engine.scheduling.block_pool import BlockPool
from nybble.engine.scheduling.scheduler import Scheduler
from nybble.engine.scheduling.step import Chunk, SampledToken, StepPlan

BLOCK_SIZE, NUM_BLOCKS = 4, 24
NOTHING = Gauges(0, 0, 0, 0, 0)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class SlowRunner:
    """A `PagedRunner` whose steps take `seconds`."""

    clock: Clock
    paged: PagedRunner
    seconds: float = 0.0

    def prepare(self, plan: StepPlan) -> None:
        self.paged.prepare(plan)

    def launch(self, plan: StepPlan) -> Callable[[], list[tuple[SampledToken, ...]]]:
        wait = self.paged.launch(plan)

        def wait_long() -> list[tuple[SampledToken, ...]]:
            self.clock.now += self.seconds
            return wait()

        return wait_long


@dataclass
class Outside:
    """An engine, and everything that can be seen of it from outside."""

    clock: Clock = field(default_factory=Clock)
    arrivals: dict[str, float] = field(default_factory=dict)
    prompt_lengths: dict[str, int] = field(default_factory=dict)
    token_times: dict[str, list[float]] = field(default_factory=dict)
    num_cached: dict[str, int] = field(default_factory=dict)
    first_steps: dict[str, float] = field(default_factory=dict)
    step_times: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    request_times: list[float] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runner = SlowRunner(self.clock, PagedRunner(BLOCK_SIZE))
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16)
        scheduler = Scheduler(config, BlockPool(NUM_BLOCKS), BLOCK_SIZE, enable_prefix_caching=True)
        limits = EngineLimits(NUM_BLOCKS * BLOCK_SIZE, 1000, BLOCK_SIZE)
        self.engine = Engine(self.runner, scheduler, limits, self.clock)

    def add(self, request_id: str, length: int, max_tokens: int) -> None:
        prompt = random_prompt(length, seed=length)
        self.engine.add(request(request_id, prompt, max_tokens))
        self.arrivals[request_id], self.prompt_lengths[request_id] = self.clock.now, length
        self.token_times[request_id] = []

    def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)
        if self.arrivals.pop(request_id, None) is not None:
            self.ends["abort"] += 1

    def step(self, seconds: float) -> None:
        self.runner.seconds = seconds
        start, num_plans = self.clock.now, len(self.runner.paged.plans)
        events = self.engine.step()
        for plan in self.runner.paged.plans[num_plans:]:
            self.step_times.append(seconds)
            for chunk in plan.chunks:
                self.first_steps.setdefault(chunk.request_id, start)
        for event in events:
            self.token_times[event.request_id].append(self.clock.now)
            self.num_cached[event.request_id] = event.num_cached_tokens
            if event.finish_reason is not None:
                self.ends[event.finish_reason] += 1
                self.finished.append(event.request_id)
                self.request_times.append(self.clock.now - self.arrivals.pop(event.request_id))


def _assert_counts(found: HistogramCounts, values: list[float], bounds: tuple[float, ...] = SECONDS) -> None:
    assert found.bounds == bounds
    assert found.cumulative == (*(sum(v <= bound for v in values) for bound in bounds), len(values))
    assert abs(found.sum - sum(values)) < 1e-6 * (1 + sum(values))


# Times are whole eighths of a second, so that sums and differences are exact.
SECONDS_PASSED = st.integers(0, 80).map(lambda eighths: eighths / 8)
ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 8)),
    st.tuples(st.just("step"), SECONDS_PASSED),
    st.tuples(st.just("wait"), SECONDS_PASSED),
    st.tuples(st.just("abort"), st.integers(0, 9)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_against_what_is_seen_outside(actions: list[tuple[object, ...]]) -> None:
    outside, num_added, arrivals = Outside(), 0, dict[str, float]()
    for action in actions:
        match action:
            case "add", int(length), int(max_tokens):
                outside.add(str(num_added), length, max_tokens)
                arrivals[str(num_added)] = outside.clock.now
                num_added += 1
            case "step", float(seconds):
                outside.step(seconds)
            case "wait", float(seconds):
                outside.clock.now += seconds
            case "abort", int(number):
                outside.abort(str(number))
    stats, times = outside.engine.stats(), outside.token_times
    begun = {name: own for name, own in times.items() if own}
    assert stats.num_generated_tokens == sum(len(own) for own in times.values())
    assert stats.num_prompt_tokens == sum(outside.prompt_lengths[name] for name in begun)
    assert stats.num_cached_tokens == sum(outside.num_cached.values())
    assert stats.num_finished == dict(outside.ends)
    assert stats.num_steps == len(outside.step_times)
    assert stats.num_waiting + stats.num_running == len(outside.arrivals)
    _assert_counts(stats.time_to_first_token, [own[0] - arrivals[name] for name, own in begun.items()])
    gaps = [after - before for own in times.values() for before, after in pairwise(own)]
    _assert_counts(stats.inter_token_latency, gaps)
    _assert_counts(stats.queue_time, [start - arrivals[name] for name, start in outside.first_steps.items()])
    _assert_counts(stats.request_time, outside.request_times)
    _assert_counts(stats.step_time, outside.step_times)
    started = outside.first_steps
    _assert_counts(stats.prefill_time, [own[0] - started[name] for name, own in begun.items()])
    finished = {name: times[name] for name in outside.finished}
    _assert_counts(stats.inference_time, [own[-1] - started[name] for name, own in finished.items()])
    _assert_counts(stats.decode_time, [own[-1] - own[0] for own in finished.values()])
    rates = [(own[-1] - own[0]) / (len(own) - 1) for own in finished.values() if len(own) > 1]
    _assert_counts(stats.time_per_output_token, rates)
    lengths = [float(outside.prompt_lengths[name]) for name in finished]
    _assert_counts(stats.prompt_tokens, lengths, TOKENS)
    _assert_counts(stats.output_tokens, [float(len(own)) for own in finished.values()], TOKENS)
    plans = outside.runner.paged.plans
    _assert_counts(stats.step_tokens, [float(plan.num_tokens) for plan in plans], POWERS_OF_TWO)
    _assert_counts(stats.step_sequences, [float(len(plan.chunks)) for plan in plans], POWERS_OF_TWO)


def test_tokens_that_come_together_have_no_time_between_them() -> None:
    """As accepted drafts do."""
    clock = Clock()
    recorder = StatsRecorder(clock)
    recorder.request_added("a", 3)
    clock.now += 2
    assert recorder.requests_admitted(["a"]) == {"a": 2.0}
    plan = StepPlan((Chunk("a", [1], 0, [0], None),))
    event = TokenEvent(request_id="a", token_id=1, logprobs=None, finish_reason=None, num_cached_tokens=0)
    clock.now += 1
    recorder.step_done(plan, 1.0, [event, event])
    clock.now += 2
    recorder.step_done(plan, 2.0, [event, event, event])
    latency = recorder.snapshot(NOTHING).inter_token_latency
    assert (latency.cumulative[-1], latency.cumulative[0], latency.sum) == (4, 3, 2.0)


def test_a_first_token_says_how_long_its_request_waited() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add("a", distinct_prompt(5), max_tokens=2)
    harness.now = 1.5
    harness.add("b", distinct_prompt(5, 1), max_tokens=2)
    times: list[tuple[str, float | None]] = []
    while harness.engine.has_work:
        events = harness.engine.step()
        times += [(e.request_id, e.queue_time) for e in events if isinstance(e, TokenEvent)]
        harness.now += 1
    assert times == [("a", 1.5), ("a", None), ("b", 2.0), ("b", None)]


def test_nothing_is_kept_of_requests_that_ended() -> None:
    outside = Outside()
    outside.add("a", 5, 2)
    outside.add("b", 5, 9)
    for _ in range(3):
        outside.step(1.0)
    outside.abort("b")
    outside.abort("b")
    outside.abort("unknown")
    assert outside.engine.stats().num_finished == {"length": 1, "abort": 1}
    assert not outside.engine._recorder._requests
