"""What the engine counts of its requests and steps, for `EngineStats`.

A token costs a look-up and a count: all tokens of a step come at the same time, so that most of them have the
same distance from their last one, which is observed once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nybble.engine.histogram import POWERS_OF_TWO, SECONDS, TOKENS, Histogram
from nybble.engine.messages import EngineStats, TokenEvent
from nybble.engine.scheduling.step import StepPlan


@dataclass(frozen=True)
class Gauges:
    """How things stand at the moment; num_preemptions: since the start."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int


class _OpenRequest:
    """When its tokens came. Before the first one `last_token` is None."""

    __slots__ = ("admission", "arrival", "first_token", "last_token", "num_prompt_tokens", "num_tokens")

    def __init__(self, arrival: float, num_prompt_tokens: int) -> None:
        self.arrival = self.admission = self.first_token = arrival
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0
        self.last_token: float | None = None


class StatsRecorder:
    """Told of everything that happens; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, _OpenRequest] = {}
        self._num_finished: dict[str, int] = {}
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._queue_time = Histogram(SECONDS)
        self._time_to_first_token = Histogram(SECONDS)
        self._inter_token_latency = Histogram(SECONDS)
        self._request_time = Histogram(SECONDS)
        self._prefill_time = Histogram(SECONDS)
        self._inference_time = Histogram(SECONDS)
        self._decode_time = Histogram(SECONDS)
        self._time_per_output_token = Histogram(SECONDS)
        self._prompt_tokens = Histogram(TOKENS)
        self._output_tokens = Histogram(TOKENS)
        self._step_time = Histogram(SECONDS)
        self._step_tokens = Histogram(POWERS_OF_TWO)
        self._step_sequences = Histogram(POWERS_OF_TWO)

    def request_added(self, request_id: str, num_prompt_tokens: int) -> None:
        self._requests[request_id] = _OpenRequest(self._clock(), num_prompt_tokens)

    def request_ended(self, request_id: str, reason: str) -> None:
        """Other than by its last token; an unknown one is ignored."""
        if self._requests.pop(request_id, None) is not None:
            self._count_end(reason)

    def requests_admitted(self, request_ids: Iterable[str]) -> dict[str, float]:
        """They run for the first time. Returns how many seconds each has waited for that."""
        now = self._clock()
        waits = {request_id: now - self._requests[request_id].arrival for request_id in request_ids}
        for request_id, seconds in waits.items():
            self._requests[request_id].admission = now
            self._queue_time.observe(seconds)
        return waits

    def step_done(self, plan: StepPlan, seconds: float, events: Sequence[TokenEvent]) -> None:
        """The tokens of a plan are there, `seconds` after it was launched."""
        now = self._clock()
        self._num_steps += 1
        self._step_time.observe(seconds)
        self._step_tokens.observe(plan.num_tokens)
        self._step_sequences.observe(len(plan.chunks))
        self._num_generated_tokens += len(events)
        counts: dict[float, int] = {}  # of tokens, by when the one before came
        for event in events:
            request = self._requests[event.request_id]
            last = request.last_token
            if last is None:
                self._count_first(request, event, now)
            else:
                counts[last] = counts.get(last, 0) + 1
            request.last_token = now
            request.num_tokens += 1
            if event.finish_reason is not None:
                self._finish(event.request_id, event.finish_reason, now)
        for last, count in counts.items():
            self._inter_token_latency.observe(now - last, count)

    def snapshot(self, gauges: Gauges) -> EngineStats:
        return EngineStats(
            num_waiting=gauges.num_waiting,
            num_running=gauges.num_running,
            num_blocks=gauges.num_blocks,
            num_free_blocks=gauges.num_free_blocks,
            num_preemptions=gauges.num_preemptions,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_finished=dict(self._num_finished),
            queue_time=self._queue_time.snapshot(),
            time_to_first_token=self._time_to_first_token.snapshot(),
            inter_token_latency=self._inter_token_latency.snapshot(),
            request_time=self._request_time.snapshot(),
            prefill_time=self._prefill_time.snapshot(),
            inference_time=self._inference_time.snapshot(),
            decode_time=self._decode_time.snapshot(),
            time_per_output_token=self._time_per_output_token.snapshot(),
            prompt_tokens=self._prompt_tokens.snapshot(),
            output_tokens=self._output_tokens.snapshot(),
            step_time=self._step_time.snapshot(),
            step_tokens=self._step_tokens.snapshot(),
            step_sequences=self._step_sequences.snapshot(),
        )

    def _count_first(self, request: _OpenRequest, event: TokenEvent, now: float) -> None:
        self._num_prompt_tokens += request.num_prompt_tokens
        self._num_cached_tokens += event.num_cached_tokens
        self._time_to_first_token.observe(now - request.arrival)
        self._prefill_time.observe(now - request.admission)
        request.first_token = now

    def _finish(self, request_id: str, reason: str, now: float) -> None:
        request = self._requests.pop(request_id)
        decode_time = now - request.first_token
        self._request_time.observe(now - request.arrival)
        self._inference_time.observe(now - request.admission)
        self._decode_time.observe(decode_time)
        if request.num_tokens > 1:
            self._time_per_output_token.observe(decode_time / (request.num_tokens - 1))
        self._prompt_tokens.observe(request.num_prompt_tokens)
        self._output_tokens.observe(request.num_tokens)
        self._count_end(reason)

    def _count_end(self, reason: str) -> None:
        self._num_finished[reason] = self._num_finished.get(reason, 0) + 1
