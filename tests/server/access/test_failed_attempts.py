from __future__ import annotations

from dataclasses import dataclass

import pytest

from nybble.server.access import failed_attempts
from nybble.server.access.failed_attempts import FailedAttempts
from nybble.server.errors import TooManyRequestsError


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def is_refused(attempts: FailedAttempts, address: str, name: str | None = None) -> bool:
    try:
        attempts.check(address, name)
    except TooManyRequestsError as error:
        assert error.code == "too_many_failed_attempts"
        return True
    return False


def test_an_address_is_refused_until_its_minute_is_over() -> None:
    clock = Clock()
    attempts = FailedAttempts(2, clock)
    assert [is_refused(attempts, "10.0.0.1") for _ in range(3)] == [False, False, True]
    assert not is_refused(attempts, "10.0.0.2")
    clock.now += 59.5
    with pytest.raises(TooManyRequestsError) as caught:
        attempts.check("10.0.0.1", None)
    assert caught.value.headers() == {"Retry-After": "1"}
    clock.now += 0.5
    assert [is_refused(attempts, "10.0.0.1") for _ in range(3)] == [False, False, True]


def test_behind_a_proxy_others_go_on() -> None:
    """Those whose keys were used from there before; a new key is no better than a guess."""
    attempts = FailedAttempts(1, Clock())
    attempts.check("10.0.0.1", "ann")
    attempts.check("10.0.0.1", None)
    assert is_refused(attempts, "10.0.0.1")
    assert is_refused(attempts, "10.0.0.1", "bob")
    assert not is_refused(attempts, "10.0.0.1", "ann")
    attempts.check("10.0.0.2", "bob")  # and this did not make it known at the other address
    assert is_refused(attempts, "10.0.0.1", "bob")


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("", "", True),
        ("testclient", "10.0.0.1", False),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, is_same: bool) -> None:
    attempts = FailedAttempts(1, Clock())
    attempts.check(one, None)
    assert is_refused(attempts, other) == is_same


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten, not those that go on trying."""
    monkeypatch.setattr(failed_attempts, "_MAX_REMEMBERED", 100)
    attempts = FailedAttempts(2, Clock())
    for number in range(1000):
        attempts.check(f"10.0.{number // 250}.{number % 250}", None)
        attempts.check(f"10.1.{number // 250}.{number % 250}", "ann")
        assert is_refused(attempts, "10.9.9.9") == (number > 1)
    assert len(attempts._failures) == len(attempts._known) == 100
    assert not is_refused(attempts, "10.0.0.0")


def test_without_a_limit_nothing_is_remembered() -> None:
    attempts = FailedAttempts(0, Clock())
    assert not any(is_refused(attempts, "10.0.0.1") for _ in range(100))
    assert not attempts._failures
