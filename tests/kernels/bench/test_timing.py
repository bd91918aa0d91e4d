"""Timing by a fake stopwatch; the real one needs a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench_shapes import FakeStopwatch

from nybble.kernels.bench.timing import CudaStopwatch, measure, quantile


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_quantiles_are_those_of_numpy(share: float) -> None:
    values = [5.0, 1.0, 4.0, 9.0, 2.0, 2.5]
    assert quantile(values, share) == pytest.approx(np.quantile(values, share))


def test_measure() -> None:
    stopwatch = FakeStopwatch(*range(1, 12))
    timing = measure(stopwatch, lambda: None)
    assert (timing.median, timing.num_runs, timing.start) == (pytest.approx(6, abs=0.5), 51, "fake")
    assert timing.p10 < timing.median < timing.p90
    assert len(stopwatch.loaded) == 1


@pytest.mark.parametrize(
    ("microseconds", "quick", "runs"),
    [(1.0, False, 51), (1.0, True, 21), (20_000.0, False, 20), (1e9, True, 11)],
)
def test_long_runs_are_timed_less_often(microseconds: float, quick: bool, runs: int) -> None:
    assert measure(FakeStopwatch(microseconds), lambda: None, quick=quick).num_runs == runs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    numbers = torch.ones(1 << 20, device="cuda")
    stopwatch = CudaStopwatch()
    timing = measure(stopwatch, lambda: numbers.add_(1), quick=True)
    assert timing.start == "graph" and 0 < timing.p10 <= timing.median <= timing.p90 < 1e5
    assert stopwatch.load(lambda: numbers.sum().item()) == "eager"
    assert all(time > 0 for time in stopwatch.times(3))
