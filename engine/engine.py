"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from nybble.engine.drafting.speculator import Speculator
from nybble.engine.engine_stats import StatsRecorder
from nybble.engine.errors import ContextLengthError, EngineBrokenError, InvalidRequestError
from nybble.engine.grammar.grammar import Grammar
from nybble.engine.grammar.grammar_compiler import GrammarCompiler
from nybble.engine.grammar.grammar_state import GrammarState
from nybble.engine.messages import (
    EngineStats,
    PromptLogprobs,
    Request,
    RequestFailed,
    SamplingParams,
    StepEvent,
)
from nybble.engine.sampling.logit_rules import logit_rules
from nybble.engine.sampling.sampling_checks import check_sampling
from nybble.engine.scheduling.admission import AdmissionControl
from nybble.engine.scheduling.removable_heap import RemovableHeap
from nybble.engine.scheduling.scheduler import Scheduler
from nybble.engine.scheduling.sequence import Sequence
from nybble.engine.scheduling.step import SampledToken, StepPlan

logger = logging.getLogger("nybble.engine")

_MAX_FAILED_STEPS = 5  # one after the other; then it is not the requests' fault


@dataclass(frozen=True)
class EngineLimits:
    """max_model_len: prompt and answer together; num_token_ids: prompt ids lie below it;
    block_lookahead: how many tokens after a block its keys and values depend on, 1 with a draft layer;
    max_waiting: how many requests may wait, None for any number."""

    max_model_len: int
    num_token_ids: int
    block_size: int
    block_lookahead: int = 0
    max_waiting: int | None = None


Sampled = AbstractSequence[tuple[SampledToken, ...]]  # the tokens of each sampling chunk
Wait = Callable[[], Sampled]


class Runner(Protocol):
    def prepare(self, plan: StepPlan) -> None:
        """Do what can be done now for a plan that may be launched next, whose token ids will have changed."""

    def launch(self, plan: StepPlan) -> Wait:
        """Start computing a plan's tokens; the returned function waits for them.

        It gives those of each sampling chunk, in order: the drafts that are accepted, up to the first that is
        not, and then the next token, so 1 to num_drafts + 1.
        """

    def is_sound(self) -> bool:
        """Whether plans can still be run, after one has failed."""


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
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`clock` gives seconds, for deadlines and statistics. `grammars` compiles those of requests."""
        self._runner = runner
        self._admission = AdmissionControl(limits.max_waiting)
        self._deadlines: RemovableHeap[str] = RemovableHeap()
        self._num_failed_steps = 0  # since one succeeded
        self.failure: str | None = None  # why no more steps can be run
        self._clock = clock
        self._recorder = StatsRecorder(clock)
        self._scheduler = scheduler
        self._limits = limits
        self._speculator = speculator
        self._grammars = grammars

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it cannot be run; nothing has changed.
            QueueFullError: too many wait already; nothing has changed.
        """
        now = self._clock()
        self._admission.check(self._scheduler.num_waiting, now)
        self._check(request)
        sampling = request.sampling
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        grammar = self._start_grammar(sampling)
        rules = logit_rules(request.prompt_token_ids, sampling, self._limits.num_token_ids, grammar)
        block_size, lookahead = self._limits.block_size, self._limits.block_lookahead
        self._scheduler.add(Sequence(request, sampling, block_size, rules, lookahead))
        self._recorder.request_added(request.request_id, len(request.prompt_token_ids))
        if request.deadline is not None:
            self._deadlines.put(request.request_id, now + request.deadline)

    def compile_grammar(self, grammar: Grammar) -> None:
        """So that a request with it can be added quickly. May be called from another thread."""
        if self._grammars is not None:
            self._grammars.compile(grammar)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; an unknown id is ignored."""
        self._end(request_id, "abort")

    def step(self, meanwhile: Callable[[], None] = _nothing) -> list[StepEvent]:
        """Run one step; returns one event for each token, those of a sequence in order.

        Before, requests whose deadline has passed end. If the step fails, its requests end with an error; if
        that leaves the engine unable to go on, `failure` says why.

        meanwhile: work of the caller's, done once, while the step is computed. It must not change the engine.

        Raises:
            EngineBrokenError: there is such a `failure` already.
        """
        if self.failure is not None:
            raise EngineBrokenError(self.failure)
        expired = self._expire()
        plan = self._scheduler.schedule()
        self._scheduler.note_waits(self._recorder.requests_admitted(self._scheduler.take_admitted()))
        if not plan.chunks:
            meanwhile()
            return [*expired]
        start = self._clock()
        wait = self._launch(plan)
        try:
            meanwhile()
        finally:
            events = self._finish(plan, wait, start)
        return [*expired, *events]

    def stats(self) -> EngineStats:
        stats = self._recorder.snapshot(self._scheduler.gauges())
        if self._speculator is None:
            return stats
        return msgspec.structs.replace(stats, speculation=self._speculator.stats())

    def check(self) -> None:
        """Assert that no block is lost. For tests, and when idle."""
        self._scheduler.check()

    def _launch(self, plan: StepPlan) -> Wait:
        """Start computing a plan. What goes wrong there goes wrong when it is waited for."""
        try:
            return self._runner.launch(plan)
        except Exception as error:
            failure = error

        def wait() -> Sampled:
            raise failure

        return wait

    def _finish(self, plan: StepPlan, wait: Wait, start: float) -> Iterable[StepEvent]:
        try:
            self._plan_ahead(plan)
            return self._take(plan, wait(), start)
        except Exception as error:
            logger.exception("a step failed that ran %d requests", len(plan.chunks))
            return self._fail(plan, error)

    def _plan_ahead(self, plan: StepPlan) -> None:
        """While a plan is run. With drafts nobody knows how many tokens come."""
        predicted = self._scheduler.predict(plan) if self._speculator is None else None
        if predicted is not None:
            self._runner.prepare(predicted)

    def _start_grammar(self, sampling: SamplingParams) -> GrammarState | None:
        """Raises InvalidRequestError: it cannot be followed."""
        grammar = sampling.grammar
        if grammar is None:
            return None
        if self._grammars is None:
            raise InvalidRequestError(f"{grammar.parameter}: this engine has no grammars", grammar.parameter)
        return self._grammars.start(grammar, sampling.stop_token_ids)

    def _take(self, plan: StepPlan, sampled: Sampled, start: float) -> list[StepEvent]:
        """Note what a plan sampled that was launched at `start`."""
        drafts = self._speculator.draft(plan, sampled) if self._speculator else {}
        now = self._clock()
        scores = _take_scores(plan)
        failed = self._end_failed(plan)
        events = self._scheduler.update(plan, sampled)
        self._scheduler.take_drafts(drafts)
        self._recorder.step_done(plan, now - start, events)
        self._num_failed_steps = 0
        for event in events:
            if event.finish_reason is not None:
                self._deadlines.remove(event.request_id)
                self._admission.note_completed(now)
        return [*scores, *failed, *events]

    def _end_failed(self, plan: StepPlan) -> list[RequestFailed]:
        """End the requests of a step for which something else went wrong than the step."""
        failed = []
        for chunk in plan.sampling_chunks:
            if chunk.rules is not None and chunk.rules.failure is not None:
                self._end(chunk.request_id, "error")
                message = f"the request was ended: {chunk.rules.failure}"
                failed.append(RequestFailed(request_id=chunk.request_id, message=message, kind="internal"))
        return failed

    def _expire(self) -> list[RequestFailed]:
        """End the requests whose time is over, waiting or running."""
        now = self._clock()
        failed = []
        while self._deadlines and self._deadlines.first_key() <= now:
            request_id = self._deadlines.first()
            self._end(request_id, "timeout")
            self._admission.note_completed(now)
            message = "the request's time was over before its answer was complete"
            failed.append(RequestFailed(request_id=request_id, message=message, kind="timeout"))
        return failed

    def _fail(self, plan: StepPlan, error: Exception) -> list[RequestFailed]:
        """End the requests of a step that failed. What others have computed lies in blocks of their own."""
        message = f"the engine failed in a step of this request: {type(error).__name__}"
        failed = []
        for chunk in plan.chunks:
            self._end(chunk.request_id, "error")
            failed.append(RequestFailed(request_id=chunk.request_id, message=message, kind="internal"))
        self._num_failed_steps += 1
        self.failure = self._find_failure()
        return failed

    def _find_failure(self) -> str | None:
        """Why no more steps can be run after one that failed, if so."""
        try:
            self.check()
        except AssertionError as error:
            return f"a step failed and left the state unsound: {error}"
        if not self._runner.is_sound():
            return "a step failed and the model cannot be run again"
        if self._num_failed_steps >= _MAX_FAILED_STEPS:
            return f"{self._num_failed_steps} steps failed one after the other"
        return None

    def _end(self, request_id: str, reason: str) -> None:
        """End a request other than by its last token; an unknown one is ignored."""
        self._deadlines.remove(request_id)
        self._recorder.request_ended(request_id, reason)
        self._scheduler.abort(request_id)

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


def _take_scores(plan: StepPlan) -> list[PromptLogprobs]:
    """What a plan has found of its prompts."""
    if not plan.has_scores:
        return []
    found = ((chunk.request_id, chunk.scores.take()) for chunk in plan.chunks if chunk.scores)
    return [PromptLogprobs(request_id=name, logprobs=logprobs) for name, logprobs in found if logprobs]
