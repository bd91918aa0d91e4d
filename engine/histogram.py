"""Counts of observed values in fixed buckets, as Prometheus has them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from nybble.engine.messages import HistogramCounts

# Of each power of ten 1, 2.5 and 5: from 0.1 ms to 2,500 s.
SECONDS = tuple(factor * 10.0**power for power in range(-4, 4) for factor in (1.0, 2.5, 5.0))[:-1]
POWERS_OF_TWO = tuple(float(1 << exponent) for exponent in range(15))  # 1 to 16,384
TOKENS = tuple(float(1 << exponent) for exponent in range(19))  # 1 to 262,144: of a whole context


class Histogram:
    """Observing costs a search among the bounds and two additions."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """A value belongs to the first bucket whose bound it does not exceed; `bounds` ascend."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)  # the last one: beyond all bounds
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """`count` times the same value."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def snapshot(self) -> HistogramCounts:
        return HistogramCounts(bounds=self._bounds, cumulative=tuple(accumulate(self._counts)), sum=self._sum)
