"""The engine's scheduling as a whole: in simulated time, by its own cost, and over random traces."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from engine_harness import Harness, distinct_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_runner import VOCABULARY, next_token

from nybble.engine.engine import Engine, EngineLimits
from nybble.engine.engine_config import SchedulerConfig
from nybble.engine.messages import Request, SamplingParams, TokenEvent
from nybble.engine.scheduling.block_pool import BlockPool
from nybble.engine.scheduling.scheduler import Scheduler
from nybble.engine.scheduling.step import SampledToken, StepPlan, build_step_input

BLOCK_SIZE = 16
STEP_COST, TOKEN_COST = 0.010, 0.00005  # seconds


@dataclass
class Simulation:
    """An engine whose steps take STEP_COST + TOKEN_COST * tokens of simulated time."""

    max_num_seqs: int = 64
    budget: int = 1024
    now: float = 0.0
    plans: list[StepPlan] = field(default_factory=list)
    arrivals: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)  # when each token came
    finished: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = SchedulerConfig(max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.budget)
        self.scheduler = Scheduler(config, BlockPool(40_000), BLOCK_SIZE, enable_prefix_caching=True)
        limits = EngineLimits(max_model_len=202_752, num_token_ids=151_552, block_size=BLOCK_SIZE)
        self.engine = Engine(self, self.scheduler, limits, clock=lambda: self.now)

    def prepare(self, plan: StepPlan) -> None:
        pass

    def is_sound(self) -> bool:
        return True

    def launch(self, plan: StepPlan) -> Callable[[], list[tuple[SampledToken, ...]]]:
        self.plans.append(plan)
        self.now += STEP_COST + TOKEN_COST * plan.num_tokens
        return lambda: [(SampledToken(7, None),) for _ in plan.sampling_chunks]

    def add(
        self, name: str, num_prompt_tokens: int, max_tokens: int, tenant: str = "", priority: int = 0
    ) -> None:
        prompt = tuple(random.Random(name).choices(range(151_552), k=num_prompt_tokens))
        sampling = SamplingParams(max_tokens=max_tokens)
        request = Request(
            request_id=name, prompt_token_ids=prompt, sampling=sampling, tenant=tenant, priority=priority
        )
        self.engine.add(request)
        self.arrivals[name], self.times[name] = self.now, []

    def step(self) -> None:
        for event in self.engine.step():
            assert isinstance(event, TokenEvent)
            self.times[event.request_id].append(self.now)
            if event.finish_reason is not None:
                self.finished.append(event.request_id)

    def run_until(self, name: str) -> None:
        """Its first token."""
        while not self.times[name]:
            self.step()

    def wait_of(self, name: str) -> float:
        return self.times[name][0] - self.arrivals[name]

    def longest_gap(self, name: str) -> float:
        times = self.times[name]
        return max(after - before for before, after in itertools.pairwise(times))

    @property
    def longest_step(self) -> float:
        return STEP_COST + TOKEN_COST * self.budget


# In simulated time.


def test_streams_go_on_while_a_long_prompt_prefills_and_it_gets_the_rest() -> None:
    simulation = Simulation()
    for number in range(32):
        simulation.add(f"stream {number}", 20, 100_000)
    simulation.step()
    simulation.add("long", 200_000, 1)
    simulation.run_until("long")
    for number in range(32):
        assert simulation.longest_gap(f"stream {number}") <= simulation.longest_step + 1e-9
    assert simulation.wait_of("long") <= (200_000 / (1024 - 32) + 1) * simulation.longest_step
    simulation.engine.check()


def test_a_prompt_makes_progress_while_decodes_fill_the_batch() -> None:
    simulation = Simulation(max_num_seqs=64, budget=64)
    for number in range(63):
        simulation.add(f"stream {number}", 1, 100_000)
    while not all(simulation.times.values()):
        simulation.step()
    simulation.add("long", 2000, 1)
    simulation.run_until("long")
    # A quarter of each step is its; 63 decodes share the other 48 tokens.
    assert simulation.wait_of("long") <= (2000 / 16 + 1) * simulation.longest_step
    for number in range(63):
        assert simulation.longest_gap(f"stream {number}") <= 2 * simulation.longest_step + 1e-9


@pytest.mark.parametrize("tenant", ["", "other"])
def test_a_short_prompt_does_not_wait_for_long_ones(tenant: str) -> None:
    simulation = Simulation()
    for number in range(3):
        simulation.add(f"long {number}", 150_000, 1)
    for _ in range(5):
        simulation.step()
    simulation.add("short", 500, 1, tenant)
    simulation.run_until("short")
    assert simulation.wait_of("short") <= 2 * simulation.longest_step
    assert not simulation.finished[1:]


def test_a_stream_of_short_prompts_leaves_half_to_the_long_one() -> None:
    simulation = Simulation()
    simulation.add("long", 50_000, 1)
    number = 0
    while not simulation.times["long"]:
        while simulation.scheduler.num_waiting < 4:
            simulation.add(f"short {number}", 700, 1)
            number += 1
        simulation.step()
    assert simulation.wait_of("long") <= (50_000 / 512 + 2) * simulation.longest_step
    assert number > 50


def test_a_tenant_s_thousand_requests_do_not_delay_another_s_one() -> None:
    simulation = Simulation(max_num_seqs=8)
    for number in range(1000):
        simulation.add(f"many {number}", 200, 20, tenant="many")
    for _ in range(30):
        simulation.step()
    simulation.add("one", 200, 1, tenant="one")
    simulation.run_until("one")
    # The next place is its own: at most as long as one of those that run takes.
    assert simulation.wait_of("one") <= 22 * simulation.longest_step
    assert len(simulation.finished) < 50


def test_tenants_get_equal_shares_however_many_requests_they_have() -> None:
    simulation = Simulation()
    for number in range(40):
        simulation.add(f"a{number}", 8000, 1, tenant="a")
    for number in range(10):
        simulation.add(f"b{number}", 8000, 1, tenant="b")
    while sum(name.startswith("b") for name in simulation.finished) < 10:
        simulation.step()
    num_a = sum(name.startswith("a") for name in simulation.finished)
    assert 9 <= num_a <= 11


def test_a_better_priority_does_not_wait_for_a_worse_one() -> None:
    simulation = Simulation(max_num_seqs=4)
    for number in range(100):
        simulation.add(f"low {number}", 100, 10, priority=5)
    simulation.step()
    simulation.add("high", 100, 1, priority=-5)
    simulation.run_until("high")
    assert simulation.wait_of("high") <= 12 * simulation.longest_step


# What scheduling itself costs: processor time, the least of several.


def _cost(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


@pytest.mark.parametrize("budget", [1024, 8192])
def test_a_long_prompt_is_planned_in_time_linear_in_its_length(budget: int) -> None:
    first, later = [], []
    for number in range(3):
        simulation = Simulation(budget=budget)
        prompt = tuple(random.Random(number).choices(range(151_552), k=200_000))
        request = Request(request_id="long", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=30))

        def step(scheduler: Scheduler = simulation.scheduler) -> None:
            plan = scheduler.schedule()
            build_step_input(plan, BLOCK_SIZE)
            scheduler.update(plan, [(SampledToken(7, None),) for _ in plan.sampling_chunks])

        def begin(simulation: Simulation = simulation, request: Request = request) -> None:
            simulation.engine.add(request)
            step(simulation.scheduler)

        first.append(_cost(begin))
        costs = [_cost(step) for _ in range(200_000 // budget + 10)]
        later.append(sorted(costs)[len(costs) // 2])
    assert min(first) < 0.150
    assert min(later) < 0.003


def _queue_costs(num_waiting: int) -> tuple[float, float]:
    """Of a step and of an abort."""
    simulation = Simulation(max_num_seqs=16)
    for number in range(16 + num_waiting):
        simulation.add(str(number), 20, 1000, tenant=str(number % 100), priority=number % 3)
    simulation.step()
    step = min(_cost(simulation.step) for _ in range(200))
    names = [sequence.request_id for sequence in itertools.islice(simulation.scheduler.waiting(), 5)]
    abort = min(_cost(functools.partial(simulation.engine.abort, name)) for name in names)
    assert simulation.scheduler.num_waiting == num_waiting - 5
    return step, abort


def test_ten_thousand_waiting_requests_slow_neither_steps_nor_aborts() -> None:
    few, many = _queue_costs(10), _queue_costs(10_000)
    assert many[0] < 3 * few[0] + 0.0005
    assert many[1] < 3 * few[1] + 0.0005


# Random traces: every request ends exactly once, with the tokens that it has alone, and no block is lost.


@dataclass(frozen=True)
class Arrival:
    prompt: tuple[int, ...]
    max_tokens: int
    tenant: str
    priority: int
    deadline: float | None


@dataclass(frozen=True)
class Guess:
    """Give every decoding sequence drafts, the first `num_right` of them what comes."""

    num_right: int
    num_wrong: int


# Few tokens and common beginnings, so that prefixes are shared often.
_prompts = st.tuples(
    st.sampled_from([(), distinct_prompt(4), distinct_prompt(9), distinct_prompt(14)]),
    st.lists(st.integers(0, 1), min_size=1, max_size=10).map(tuple),
).map(lambda parts: parts[0] + parts[1])
_arrivals = st.builds(
    Arrival,
    _prompts,
    st.sampled_from([1, 3, 9, 12]),
    st.sampled_from(["", "a", "b"]),
    st.integers(-1, 1),
    st.sampled_from([None, None, None, 1.5, 6.0]),
)
_guesses = st.builds(Guess, st.integers(0, 4), st.integers(0, 2))
_aborts = st.integers(0, 20)
_steps = st.sampled_from(["step"] * 9 + ["fault"])
# Mostly bursts of requests, and steps with and without drafts.
_actions = st.one_of(_arrivals, _arrivals, _arrivals, _steps, _steps, _guesses, _guesses, _aborts)


class Trace:
    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.arrivals: list[Arrival] = []
        self.aborted: set[str] = set()

    def act(self, action: Arrival | Guess | int | str) -> None:
        match action:
            case Arrival():
                name = str(len(self.arrivals))
                self.harness.add(
                    name,
                    action.prompt,
                    action.max_tokens,
                    tenant=action.tenant,
                    priority=action.priority,
                    deadline=action.deadline,
                )
                self.arrivals.append(action)
            case Guess():
                self._guess(action)
            case int():
                self._abort(str(action))
            case "fault":
                self.harness.runner.fault = lambda plan: RuntimeError("a fault of the trace")
                self.step()
                self.harness.runner.fault = lambda plan: None
            case _:
                self.step()

    def step(self) -> None:
        self.harness.now += 1.0
        self.harness.step()

    def finish(self) -> None:
        for _ in range(1000):
            if not self.harness.engine.has_work:
                break
            self.step()
        assert not self.harness.engine.has_work
        assert self.harness.engine.failure is None
        assert self.harness.engine.stats().num_free_blocks == self.harness.num_blocks

    def assert_ended_once(self, name: str, arrival: Arrival) -> None:
        ends = [
            name in self.harness.finished,
            name in self.harness.failed,
            name in self.aborted,
        ]
        assert sum(ends) == 1
        is_whole = name in self.harness.finished
        self.harness.assert_right_tokens(name, arrival.max_tokens if is_whole else None)

    def _guess(self, guess: Guess) -> None:
        for sequence in self.harness.scheduler.running:
            if not sequence.is_decoding:
                continue
            tokens = list(sequence.token_ids)
            for _ in range(guess.num_right):
                tokens.append(next_token(tokens))
            wrong = [(next_token(tokens) + 1) % VOCABULARY] * guess.num_wrong
            sequence.drafts = (*tokens[len(sequence.token_ids) :], *wrong)

    def _abort(self, name: str) -> None:
        ended = name in self.harness.finished or name in self.harness.failed
        if int(name) < len(self.arrivals) and not ended:
            self.aborted.add(name)
        self.harness.engine.abort(name)
        self.harness.engine.check()
        assert name not in self.harness.scheduler


@settings(max_examples=200, deadline=None)
@given(
    actions=st.lists(_actions, min_size=25, max_size=60),
    num_blocks=st.integers(9, 14),
    max_num_seqs=st.integers(1, 6),
    extra_budget=st.integers(0, 20),
    enable_prefix_caching=st.booleans(),
)
def test_random_traces(
    actions: list[Arrival | Guess | int | str],
    num_blocks: int,
    max_num_seqs: int,
    extra_budget: int,
    enable_prefix_caching: bool,
) -> None:
    budget = max_num_seqs + extra_budget
    trace = Trace(Harness(num_blocks, max_num_seqs, budget, enable_prefix_caching))
    num_faults = 0
    for action in actions:
        num_faults = num_faults + 1 if action == "fault" else 0 if action == "step" else num_faults
        if num_faults < 4:  # more in a row would rightly stop the engine
            trace.act(action)
    trace.finish()
    for number, arrival in enumerate(trace.arrivals):
        trace.assert_ended_once(str(number), arrival)
    for plan in trace.harness.runner.plans:
        assert 0 < plan.num_tokens <= budget
        assert len(plan.chunks) <= max_num_seqs
