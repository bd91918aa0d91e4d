"""An engine over a `PagedRunner`, stepped and watched by a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from paged_runner import VOCABULARY, PagedRunner, next_token

from nybble.engine.engine import Engine, EngineLimits
from nybble.engine.engine_config import SchedulerConfig
from nybble.engine.messages import CacheExplanation, Request, RequestFailed, SamplingParams, StepEvent
from nybble.engine.scheduling.block_pool import BlockPool
from nybble.engine.scheduling.scheduler import Scheduler

BLOCK_SIZE = 4


@dataclass
class Harness:
    """Everything that the engine said, on a clock that the test moves. Every step checks the blocks."""

    num_blocks: int = 100
    max_num_seqs: int = 8
    budget: int = 64
    enable_prefix_caching: bool = True
    max_waiting: int | None = None
    now: float = 0.0
    prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    finish_reasons: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    num_cached: dict[str, int] = field(default_factory=dict)
    explanations: dict[str, CacheExplanation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runner = PagedRunner(BLOCK_SIZE)
        config = SchedulerConfig(max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.budget)
        pool = BlockPool(self.num_blocks)
        self.scheduler = Scheduler(config, pool, BLOCK_SIZE, self.enable_prefix_caching)
        limits = EngineLimits(
            self.num_blocks * BLOCK_SIZE, VOCABULARY, BLOCK_SIZE, max_waiting=self.max_waiting
        )
        self.engine = Engine(self.runner, self.scheduler, limits, clock=lambda: self.now)

    def add(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        max_tokens: int = 4,
        stop_token_ids: tuple[int, ...] = (),
        **fields: Any,
    ) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids)
        request = Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, **fields)
        self.engine.add(request)
        self.prompts[request_id], self.tokens[request_id] = prompt, []

    def step(self) -> dict[str, int]:
        """Run a step; returns how many tokens each request ran, in the plan's order."""
        num_plans, num_faults = len(self.runner.plans), self.runner.num_faults
        for event in self.engine.step():
            self._note(event, may_fail=self.runner.num_faults > num_faults)
        self.engine.check()
        plans = self.runner.plans[num_plans:]
        return {chunk.request_id: len(chunk.token_ids) for plan in plans for chunk in plan.chunks}

    def run_until_preemption(self) -> dict[str, int]:
        """The step that preempts."""
        while self.engine.has_work:
            plan = self.step()
            if self.engine.stats().num_preemptions:
                return plan
        raise AssertionError("all requests ended without a preemption")

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
        waiting = sorted(self.scheduler.waiting(), key=lambda sequence: sequence.arrival)
        return [sequence.request_id for sequence in waiting]

    def running_ids(self) -> list[str]:
        return [sequence.request_id for sequence in self.scheduler.running]

    def _note(self, event: StepEvent, may_fail: bool) -> None:
        assert event.request_id not in self.finished
        assert event.request_id not in self.failed
        if isinstance(event, RequestFailed):
            assert may_fail or event.kind == "timeout", event.message
            self.failed[event.request_id] = event.kind
            return
        self.tokens[event.request_id].append(event.token_id)
        self.num_cached[event.request_id] = event.num_cached_tokens
        if event.cache_explanation is not None:
            assert event.request_id not in self.explanations
            self.explanations[event.request_id] = event.cache_explanation
        if event.finish_reason is not None:
            self.finished.append(event.request_id)
            self.finish_reasons[event.request_id] = event.finish_reason


def distinct_prompt(length: int, first: int = 0) -> tuple[int, ...]:
    """Different from the first token on for different `first`."""
    return tuple((first + i // 3 * 5 + i) % VOCABULARY for i in range(length))
