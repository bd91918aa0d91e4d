"""Throughput and latency of an engine, offline: requests of one shape, all there from the start.

A case is run several times, each with fresh random prompts, which therefore no cache knows. A time belongs to
the step that gave the token: an event counts when its step has returned and the step's events are encoded as
for the server. No time is reported of a run in which a request got anything but its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nybble.engine.channel import encode_frame
from nybble.engine.engine import Engine
from nybble.engine.errors import NybbleError
from nybble.engine.messages import EngineStats, Request, RequestFailed, SamplingParams, TokenEvent


class BenchError(NybbleError):
    """A run that went wrong, so that its times mean nothing."""


@dataclass(frozen=True)
class BenchCase:
    """`batch` requests that run together, and `num_queued` more that wait meanwhile."""

    batch: int
    prompt_length: int
    output_length: int
    num_queued: int = 0

    @property
    def length(self) -> int:
        return self.prompt_length + self.output_length

    def __str__(self) -> str:
        queue = f" with {self.num_queued} queued" if self.num_queued else ""
        return f"{self.batch} x ({self.prompt_length} + {self.output_length}){queue}"


@dataclass(frozen=True)
class Spread:
    """Median, tenths and least of many values."""

    median: float
    p10: float
    p90: float
    least: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread | None:
        if not len(values):
            return None
        p10, median, p90 = np.percentile(values, (10, 50, 90))
        return cls(float(median), float(p10), float(p90), float(values.min()))


@dataclass(frozen=True)
class CaseResult:
    """Times in seconds, over all requests and repeats.

    prefill_tokens_per_s: prompt tokens over the time until the last request has its first token, median of
        the repeats; requests that are ahead decode in that time
    decode_tokens_per_s: tokens over time after that; None if none are left then
    time_to_first_token: of each request, from the start of all
    inter_token_latency: between one token of a request and the next
    decode_step: of steps in which every request got a token, and none its first
    num_steps: of the last repeat
    stats: the engine's own, after warm-up and repeats
    """

    case: BenchCase
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    time_to_first_token: Spread
    inter_token_latency: Spread | None
    decode_step: Spread | None
    num_steps: int
    stats: EngineStats


@dataclass(frozen=True)
class _Run:
    """ends: float64 [steps], seconds since the start; counts: int [steps], tokens that each gave;
    tokens: float64 [batch, output_length], when each token came."""

    ends: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray

    @property
    def prefill_time(self) -> float:
        return float(self.tokens[:, 0].max())

    @property
    def decode_rate(self) -> float | None:
        num_left = int((self.tokens > self.prefill_time).sum())
        return num_left / (self.ends[-1] - self.prefill_time) if num_left else None

    @property
    def decode_steps(self) -> np.ndarray:
        is_full = (self.counts == len(self.tokens)) & (self.ends > self.prefill_time)
        durations = np.diff(self.ends, prepend=0.0)
        return np.asarray(durations[is_full])


def measure(
    engine: Engine,
    case: BenchCase,
    num_repeats: int,
    num_warmups: int = 1,
    *,
    num_token_ids: int,
    clock: Callable[[], float] = time.perf_counter,
) -> CaseResult:
    """Run a case on an idle engine that has room for it. Prompts are of ids below `num_token_ids`.

    Raises:
        BenchError: a request did not get exactly the tokens that it asked for.
        InvalidRequestError: the engine does not take such requests.
    """
    random = np.random.default_rng(0)
    runs = [_run(engine, case, num_token_ids, random, clock) for _ in range(num_warmups + num_repeats)]
    runs = runs[num_warmups:]
    first_tokens = Spread.of(np.concatenate([run.tokens[:, 0] for run in runs]))
    assert first_tokens is not None
    rates = [rate for run in runs if (rate := run.decode_rate) is not None]
    num_prompt_tokens = case.batch * case.prompt_length
    return CaseResult(
        case=case,
        prefill_tokens_per_s=float(np.median([num_prompt_tokens / run.prefill_time for run in runs])),
        decode_tokens_per_s=float(np.median(rates)) if rates else None,
        time_to_first_token=first_tokens,
        inter_token_latency=Spread.of(np.concatenate([np.diff(run.tokens).ravel() for run in runs])),
        decode_step=Spread.of(np.concatenate([run.decode_steps for run in runs])),
        num_steps=len(runs[-1].ends),
        stats=engine.stats(),
    )


def _run(
    engine: Engine,
    case: BenchCase,
    num_token_ids: int,
    random: np.random.Generator,
    clock: Callable[[], float],
) -> _Run:
    measured = list(_requests(case.batch, case, num_token_ids, random, "run"))
    queued = list(_requests(case.num_queued, case, num_token_ids, random, "queued"))
    start = clock()
    for request in (*measured, *queued):
        engine.add(request)
    steps = list(_steps(engine, {request.request_id for request in measured}, clock))
    for request in queued:
        engine.abort(request.request_id)
    engine.check()
    times = _token_times(steps, measured, case)
    return _Run(
        ends=np.array([end for end, _ in steps]) - start,
        counts=np.array([len(events) for _, events in steps]),
        tokens=times - start,
    )


def _steps(
    engine: Engine, open_ids: set[str], clock: Callable[[], float]
) -> Iterator[tuple[float, list[TokenEvent]]]:
    """When each step ended, and its events, until the open requests have ended. Raises BenchError."""
    while open_ids and engine.has_work:
        events: list[TokenEvent] = []
        for event in engine.step():
            if isinstance(event, RequestFailed):
                raise BenchError(event.message)
            if isinstance(event, TokenEvent):
                events.append(event)
        encode_frame(events)
        yield clock(), events
        open_ids -= {event.request_id for event in events if event.finish_reason is not None}


def _token_times(
    steps: list[tuple[float, list[TokenEvent]]], requests: list[Request], case: BenchCase
) -> np.ndarray:
    """float64 [batch, output_length]: when each token came. Raises BenchError."""
    times: dict[str, list[float]] = {request.request_id: [] for request in requests}
    for end, events in steps:
        for event in events:
            if event.request_id in times:
                times[event.request_id].append(end)
    for request_id, own in times.items():
        if len(own) != case.output_length:
            raise BenchError(f"{case}: {request_id} got {len(own)} tokens, expected {case.output_length}")
    return np.array(list(times.values()))


def _requests(
    count: int, case: BenchCase, num_token_ids: int, random: np.random.Generator, prefix: str
) -> Iterator[Request]:
    """Greedy ones that no token ends early."""
    sampling = SamplingParams(max_tokens=case.output_length, temperature=0.0)
    for number in range(count):
        prompt = random.integers(num_token_ids, size=case.prompt_length).tolist()
        yield Request(request_id=f"{prefix}-{number}", prompt_token_ids=tuple(prompt), sampling=sampling)
