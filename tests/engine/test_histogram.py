from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.histogram import POWERS_OF_TWO, SECONDS, Histogram

NUMBERS = st.floats(0, 1e6, allow_nan=False)


@given(
    st.lists(NUMBERS, min_size=1, max_size=6, unique=True).map(sorted),
    st.lists(st.tuples(NUMBERS, st.integers(0, 5)), max_size=30),
)
def test_cumulative_counts_against_counting(bounds: list[float], observed: list[tuple[float, int]]) -> None:
    histogram = Histogram(bounds)
    for value, count in observed:
        histogram.observe(value, count)
    values = [value for value, count in observed for _ in range(count)]
    found = histogram.snapshot()
    assert found.bounds == tuple(bounds)
    assert found.cumulative == (*(sum(v <= bound for v in values) for bound in bounds), len(values))
    assert found.sum == pytest.approx(sum(values))


def test_a_value_on_a_bound_belongs_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 2.0, 2.5):
        histogram.observe(value)
    assert histogram.snapshot().cumulative == (1, 2, 3)


def test_bounds_ascend() -> None:
    for bounds in (SECONDS, POWERS_OF_TWO):
        assert list(bounds) == sorted(set(bounds))
    assert SECONDS[:4] == pytest.approx((1e-4, 2.5e-4, 5e-4, 1e-3)) and SECONDS[-1] == 2500
    assert (POWERS_OF_TWO[0], POWERS_OF_TWO[-1]) == (1, 16384)
