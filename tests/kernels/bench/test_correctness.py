"""The gate before a speed: it must not let a wrong result pass."""

from __future__ import annotations

import math

import pytest
import torch

from nybble.kernels.bench.correctness import EXACT, Tolerance, checked_rows, deviation, poisoned_memory

LOOSE = Tolerance(max_error=0.1, rms_error=0.01)


def test_errors_are_relative_to_the_rms() -> None:
    expected = torch.full((100,), 4.0)
    actual = expected.clone()
    actual[7] += 0.2
    found = deviation(actual, expected)
    assert found.max_error == pytest.approx(0.05) and found.rms_error == pytest.approx(0.005)
    assert LOOSE.admits(found)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:9], lambda x: x * 1.2, lambda x: x + 0.05, lambda x: x / 0, lambda x: x * math.nan],
    ids=["shape", "scale", "shift", "infinite", "nan"],
)
def test_wrong_results(change: object) -> None:
    expected = torch.linspace(1, 2, 10)
    assert not LOOSE.admits(deviation(change(expected), expected))  # type: ignore[operator]


def test_one_number_far_off() -> None:
    expected = torch.ones(10_000)
    actual = expected.clone()
    actual[-1] = 1.5
    assert not LOOSE.admits(deviation(actual, expected))


def test_some_rows_are_compared_but_all_must_be_finite() -> None:
    actual = torch.arange(12.0).view(4, 3)
    rows = torch.tensor([0, 3])
    assert EXACT.admits(deviation(actual, actual[rows].double(), rows))
    actual[1, 2] = math.nan
    assert not EXACT.admits(deviation(actual, torch.arange(12.0).view(4, 3)[rows], rows))


def test_expected_zeros_must_be_met() -> None:
    assert EXACT.admits(deviation(torch.zeros(3), torch.zeros(3)))
    assert not LOOSE.admits(deviation(torch.full((3,), 0.2), torch.zeros(3)))


def test_rows_are_spread_from_first_to_last() -> None:
    assert checked_rows(5).tolist() == [0, 1, 2, 3, 4]
    rows = checked_rows(16384)
    assert len(rows) == 256 and rows[0] == 0 and rows[-1] == 16383
    assert checked_rows(1, 3).tolist() == [0]


def test_new_memory_is_poisoned() -> None:
    with poisoned_memory():
        assert torch.empty(8).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
