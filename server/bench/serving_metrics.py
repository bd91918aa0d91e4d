"""What a serving benchmark says of its requests.

    TTFT  sent to the first chunk with output
    TPOT  (last chunk - first chunk) / (output tokens - 1)
    ITL   from one chunk with output to the next; a chunk may hold several tokens
    E2E   sent to the end of the response

Tokens are counted by the server's `usage`, never by chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nybble.server.bench.timed_request import Timing


@dataclass(frozen=True)
class Distribution:
    mean: float
    median: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """Percentiles by linear interpolation; None of nothing."""
        if not len(values):
            return None
        median, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(float(np.mean(values)), float(median), float(p90), float(p99), float(np.max(values)))


@dataclass(frozen=True)
class SLO:
    """What a request must keep to for goodput, in seconds; None: nothing. An answer of one token has no TPOT
    and keeps to it."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def is_met(self, timing: Timing) -> bool:
        pairs = ((self.ttft, ttft(timing)), (self.tpot, tpot(timing)), (self.e2e, e2e(timing)))
        return all(limit is None or value is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True)
class ServingMetrics:
    """Of the requests of one load. Times in seconds; distributions are over finished requests.

    duration: from the first request's turn to the end of the last response, which rates are over.
    goodput: requests a second that keep to the SLO. errors: how many requests failed, by message; what they
    had got of an answer counts nowhere. tokens_per_chunk: output tokens over chunks with output.
    send_delay: how much later than its turn a request was sent, connecting included; if this is not small
    against TTFT, the generator or the server's accepting was the bottleneck.
    """

    num_requests: int
    num_finished: int
    errors: dict[str, int]
    duration: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    first_byte: Distribution | None
    send_delay: Distribution | None
    prompt_tokens: Distribution | None
    output_tokens: Distribution | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    tokens_per_chunk: float


def ttft(timing: Timing) -> float:
    return timing.output_times[0] - timing.sent


def tpot(timing: Timing) -> float | None:
    if timing.num_output_tokens < 2:
        return None
    return (timing.output_times[-1] - timing.output_times[0]) / (timing.num_output_tokens - 1)


def e2e(timing: Timing) -> float:
    return timing.end - timing.sent


def summarize(timings: Sequence[Timing], slo: SLO) -> ServingMetrics:
    """Of at least one request."""
    good = [timing for timing in timings if timing.error is None]
    errors = Counter(timing.error for timing in timings if timing.error is not None)
    duration = max(t.end for t in timings) - min(t.scheduled for t in timings)
    num_prompt = sum(timing.num_prompt_tokens for timing in good)
    num_output = sum(timing.num_output_tokens for timing in good)
    num_chunks = sum(len(timing.output_times) for timing in good)
    gaps = [np.diff(timing.output_times) for timing in good]
    return ServingMetrics(
        num_requests=len(timings),
        num_finished=len(good),
        errors=dict(errors.most_common()),
        duration=duration,
        requests_per_s=len(good) / duration,
        output_tokens_per_s=num_output / duration,
        total_tokens_per_s=(num_prompt + num_output) / duration,
        goodput=sum(slo.is_met(timing) for timing in good) / duration,
        ttft=Distribution.of([ttft(timing) for timing in good]),
        tpot=Distribution.of([value for timing in good if (value := tpot(timing)) is not None]),
        itl=Distribution.of(np.concatenate(gaps).tolist() if gaps else []),
        e2e=Distribution.of([e2e(timing) for timing in good]),
        first_byte=Distribution.of([t.first_byte - t.sent for t in good if t.first_byte is not None]),
        send_delay=Distribution.of([timing.sent - timing.scheduled for timing in good]),
        prompt_tokens=Distribution.of([timing.num_prompt_tokens for timing in good]),
        output_tokens=Distribution.of([timing.num_output_tokens for timing in good]),
        num_prompt_tokens=num_prompt,
        num_cached_tokens=sum(timing.num_cached_tokens for timing in good),
        num_output_tokens=num_output,
        tokens_per_chunk=num_output / num_chunks if num_chunks else 0.0,
    )
