"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from nybble.engine.engine_stats import StatsRecorder
from nybble.engine.errors import ContextLengthError, InvalidRequestError
from nybble.engine.logit_rules import logit_rules
from nybble.engine.messages import EngineStats, Request, TokenEvent
from nybble.engine.sampling_checks import check_sampling
from nybble.engine.scheduler import Scheduler
from nybble.engine.sequence import Sequence
from nybble.engine.speculator import Speculator
from nybble.engine.step import SampledToken, StepPlan


@dataclass(frozen=True)
class EngineLimits:
    """max_model_len: prompt and answer together; num_token_ids: prompt ids lie below it;
    block_lookahead: how many tokens after a block its keys and values depend on, 1 with a draft layer."""

    max_model_len: int
    num_token_ids: int
    block_size: int
    block_lookahead: int = 0


class Runner(Protocol):
    def prepare(self, plan: StepPlan) -> None:
        """Do what can be done now for a plan that may be launched next, whose token ids will have changed."""

    def launch(self, plan: StepPlan) -> Callable[[], AbstractSequence[tuple[SampledToken, ...]]]:
        """Start computing a plan's tokens; the returned function waits for them.

        It gives those of each sampling chunk, in order: the drafts that are accepted, up to the first that is
        not, and then the next token, so 1 to num_drafts + 1.
        """


def _nothing() -> None:
    pass


class Engine:
    """Single-threaded; the caller alternates `add` and `abort` with `step` as it likes."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        limits: EngineLimits,
        clock: Callable[[], float] = time.monotonic,
        speculator: Speculator | None = None,
    ) -> None:
        """`clock` gives seconds, for statistics."""
        self._runner = runner
        self._clock = clock
        self._recorder = StatsRecorder(clock)
        self._scheduler = scheduler
        self._limits = limits
        self._speculator = speculator

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it cannot be run; nothing has changed.
        """
        self._check(request)
        sampling = request.sampling
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        self._recorder.request_added(request.request_id, len(request.prompt_token_ids))
        rules = logit_rules(request.prompt_token_ids, sampling, self._limits.num_token_ids)
        block_size, lookahead = self._limits.block_size, self._limits.block_lookahead
        self._scheduler.add(Sequence(request, sampling, block_size, rules, lookahead))

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; an unknown id is ignored."""
        self._recorder.request_ended(request_id, "abort")
        self._scheduler.abort(request_id)

    def step(self, meanwhile: Callable[[], None] = _nothing) -> list[TokenEvent]:
        """Run one step; returns one event for each token, those of a sequence in order.

        meanwhile: work of the caller's, done once, while the step is computed. It must not change the engine.
        """
        plan = self._scheduler.schedule()
        if not plan.chunks:
            meanwhile()
            return []
        self._recorder.requests_admitted(self._scheduler.take_admitted())
        start = self._clock()
        wait = self._runner.launch(plan)
        try:
            meanwhile()
            predicted = self._scheduler.predict(plan)
            if predicted is not None:
                self._runner.prepare(predicted)
        finally:
            sampled = wait()
            drafts = self._speculator.draft(plan, sampled) if self._speculator else {}
            seconds = self._clock() - start
            events = self._scheduler.update(plan, sampled)
            self._scheduler.take_drafts(drafts)
            self._recorder.step_done(plan, seconds, events)
        return events

    def stats(self) -> EngineStats:
        stats = self._recorder.snapshot(self._scheduler.gauges())
        if self._speculator is None:
            return stats
        return msgspec.structs.replace(stats, speculation=self._speculator.stats())

    def check(self) -> None:
        """Assert that no block is lost. For tests, and when idle."""
        self._scheduler.check()

    def _check(self, request: Request) -> None:
        prompt = request.prompt_token_ids
        if request.request_id in self._scheduler:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", "request_id")
        if not prompt:
            raise InvalidRequestError("the prompt is empty", "prompt")
        if not 0 <= min(prompt) <= max(prompt) < self._limits.num_token_ids:
            raise InvalidRequestError(
                f"prompt token ids must lie in 0 .. {self._limits.num_token_ids - 1}", "prompt"
            )
        check_sampling(request.sampling, self._limits.num_token_ids)
        ContextLengthError.check(len(prompt), request.sampling.max_tokens, self._limits.max_model_len)
