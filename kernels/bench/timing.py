"""Timing on a GPU: cold L2 cache, CUDA graphs, medians.

A run is captured in a graph, so that launches cost what they cost in a decode step. Before every timed replay
twice the L2 cache is read from elsewhere: read and not written, for dirty lines would be written back while
the clock runs. The reading also keeps the GPU busy until the replay is queued.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Run = Callable[[], object]

_WARM_UPS = 3
_FEWEST, _MOST = 11, 51
_QUICK_MOST = 21
_BUDGET_US = 400_000.0


class Stopwatch(Protocol):
    """Takes times in microseconds, each with a cold cache."""

    def load(self, run: Run) -> str:
        """Get ready to time `run`; says how it will be started: "graph" or "eager"."""

    def times(self, count: int) -> list[float]:
        """Of `count` runs."""


@dataclass(frozen=True)
class Timing:
    """Microseconds; start: how runs were started."""

    median: float
    p10: float
    p90: float
    num_runs: int
    start: str


def measure(stopwatch: Stopwatch, run: Run, *, quick: bool = False) -> Timing:
    """As many runs as fit in a budget of time, within bounds, after some that do not count."""
    start = stopwatch.load(run)
    estimate = max(stopwatch.times(_WARM_UPS))
    most = _QUICK_MOST if quick else _MOST
    count = min(max(int(_BUDGET_US / max(estimate, 1.0)), _FEWEST), most)
    times = stopwatch.times(count)
    return Timing(quantile(times, 0.5), quantile(times, 0.1), quantile(times, 0.9), count, start)


def quantile(values: Sequence[float], share: float) -> float:
    """Between neighbours linear, as numpy has it."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class CudaStopwatch:
    """Of the current CUDA device."""

    def __init__(self) -> None:
        self.l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._other = torch.ones(2 * self.l2_bytes // 4, dtype=torch.int32, device="cuda")
        self._replay: Run = lambda: None

    def load(self, run: Run) -> str:
        """A run that waits for the device, as some peers' do, cannot be captured."""
        self._warm_up(run)
        if _waits(run):
            self._replay = run
            return "eager"
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                run()
        finally:
            torch.cuda.set_stream(stream)  # which a capture that fails does not do
        self._replay = graph.replay
        return "graph"

    def _warm_up(self, run: Run) -> None:
        """What is compiled or allocated once must not be captured."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def times(self, count: int) -> list[float]:
        events = [self._timed() for _ in range(count)]
        torch.cuda.synchronize()
        return [1000 * start.elapsed_time(end) for start, end in events]

    def _timed(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._other.sum()
        start.record()
        self._replay()
        end.record()
        return start, end


def _waits(run: Run) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return False
