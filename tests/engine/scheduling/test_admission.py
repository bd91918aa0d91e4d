from __future__ import annotations

import pytest

from nybble.engine.errors import QueueFullError
from nybble.engine.scheduling.admission import AdmissionControl


def test_requests_are_refused_from_the_bound_on() -> None:
    admission = AdmissionControl(max_waiting=3)
    admission.check(2, now=0.0)
    with pytest.raises(QueueFullError, match="3 requests are waiting, the most that max_waiting admits"):
        admission.check(3, now=0.0)


def test_a_bound_of_zero_refuses_all_and_none_refuses_nobody() -> None:
    with pytest.raises(QueueFullError):
        AdmissionControl(max_waiting=0).check(0, now=0.0)
    AdmissionControl(max_waiting=None).check(1_000_000, now=0.0)


def test_retry_after_is_the_time_for_half_of_the_queue() -> None:
    admission = AdmissionControl(max_waiting=40)
    for second in range(0, 20, 2):
        admission.note_completed(100.0 + second)
    # Ten were completed in 20 s: 20 more take 40 s.
    with pytest.raises(QueueFullError) as caught:
        admission.check(40, now=120.0)
    assert caught.value.retry_after == pytest.approx(40.0)


def test_retry_after_follows_a_change_of_rate() -> None:
    admission = AdmissionControl(max_waiting=40)
    for number in range(1000):
        admission.note_completed(float(number))
    for number in range(100):
        admission.note_completed(1000.0 + number / 10)
    assert admission.retry_after(40, now=1010.0) == pytest.approx(2.0, rel=0.05)


def test_a_rate_falls_while_nothing_is_completed() -> None:
    admission = AdmissionControl(max_waiting=40)
    for number in range(10):
        admission.note_completed(float(number))
    assert admission.retry_after(10, now=10.0) < admission.retry_after(10, now=20.0)


@pytest.mark.parametrize(("num_waiting", "expected"), [(1, 1.0), (1_000_000, 60.0)])
def test_retry_after_has_limits(num_waiting: int, expected: float) -> None:
    admission = AdmissionControl(max_waiting=1)
    for number in range(10):
        admission.note_completed(number / 10)
    assert admission.retry_after(num_waiting, now=1.0) == expected


def test_without_any_rate_there_is_a_default() -> None:
    admission = AdmissionControl(max_waiting=1)
    assert admission.retry_after(10, now=5.0) == 5.0
    admission.note_completed(5.0)
    admission.note_completed(5.0)
    assert admission.retry_after(10, now=5.0) == 5.0
