"""Against sums written out by hand, in plain Python."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.bench.serving_metrics import SLO, Distribution, summarize
from nybble.server.bench.timed_request import Timing


def timing(sent: float, gaps: list[float], num_output: int, tail: float = 0.5, num_cached: int = 0) -> Timing:
    """Sent 0.25 s after its turn; gaps: to the first chunk, and between chunks."""
    times = [sent + sum(gaps[: number + 1]) for number in range(len(gaps))]
    return Timing(
        scheduled=sent - 0.25,
        sent=sent,
        first_byte=times[0] - 0.0625,
        output_times=times,
        end=times[-1] + tail,
        num_prompt_tokens=100,
        num_cached_tokens=num_cached,
        num_output_tokens=num_output,
    )


def test_by_hand() -> None:
    """Two requests, of which the second gets 9 tokens in 3 chunks."""
    good = [timing(1.0, [1.0, 0.5], 2), timing(2.0, [2.0, 0.25, 0.75], 9, num_cached=64)]
    bad = [Timing(0.5, sent=0.5, end=9.75, error="x"), Timing(0.75, sent=1.0, end=2.0, error="x")]
    metrics = summarize([*good, *bad], SLO(ttft=1.5))
    assert (metrics.num_requests, metrics.num_finished, metrics.errors) == (4, 2, {"x": 2})
    assert metrics.duration == 9.25
    assert metrics.requests_per_s == 2 / 9.25 and metrics.goodput == 1 / 9.25
    assert metrics.output_tokens_per_s == 11 / 9.25 and metrics.total_tokens_per_s == 211 / 9.25
    assert metrics.ttft is not None and (metrics.ttft.mean, metrics.ttft.max) == (1.5, 2.0)
    assert metrics.tpot is not None and (metrics.tpot.mean, metrics.tpot.max) == ((0.5 + 1 / 8) / 2, 0.5)
    assert metrics.itl is not None and metrics.itl.mean == 0.5 and metrics.itl.max == 0.75
    assert metrics.e2e is not None and (metrics.e2e.mean, metrics.e2e.max) == ((2.0 + 3.5) / 2, 3.5)
    assert metrics.first_byte is not None and metrics.first_byte.mean == 1.4375
    assert metrics.send_delay is not None and metrics.send_delay.max == 0.25
    assert (metrics.num_prompt_tokens, metrics.num_cached_tokens, metrics.num_output_tokens) == (200, 64, 11)
    assert metrics.tokens_per_chunk == 11 / 5


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_percentiles(values: list[float]) -> None:
    def percentile(share: float) -> float:
        ordered, place = sorted(values), share * (len(values) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    found = Distribution.of(values)
    assert found is not None
    expected = (statistics.fmean(values), percentile(0.5), percentile(0.9), percentile(0.99), max(values))
    assert list(asdict(found).values()) == pytest.approx(expected)


def test_nothing_finished() -> None:
    metrics = summarize([Timing(1.0, 1.0, end=2.0, error="x")], SLO())
    assert metrics.output_tokens_per_s == metrics.goodput == metrics.tokens_per_chunk == 0
    assert metrics.ttft is metrics.tpot is metrics.itl is metrics.e2e is None


@pytest.mark.parametrize(
    ("slo", "is_met"),
    [
        (SLO(), True),
        (SLO(ttft=1.0, tpot=0.25, e2e=3.0), True),
        (SLO(ttft=0.9), False),
        (SLO(tpot=0.2), False),
        (SLO(e2e=2.4), False),
    ],
)
def test_slo(slo: SLO, is_met: bool) -> None:
    assert slo.is_met(timing(1.0, [1.0, 0.5, 0.5], 5)) is is_met


def test_one_token_has_no_tpot_to_miss() -> None:
    assert SLO(tpot=0.001).is_met(timing(1.0, [1.0], 1))
