from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.access.account import Account
from nybble.server.access.api_keys import APIKey
from nybble.server.access.prices import Prices
from nybble.server.access.usage_ledger import DayUse
from nybble.server.access.visit import Visit
from nybble.server.errors import TooManyRequestsError

NOON = 86400.0 * 10.5
PRICES = Prices(input_price=1.0, output_price=10.0, cached_price=0.25)


def account(used: int = 0, **limits: Any) -> Account:
    key = APIKey(name="ann", sha256=hashlib.sha256(b"ann").hexdigest(), **limits)
    return Account(key, DayUse(tokens=used), PRICES, lambda: NOON, lambda: 0.0)


def refusal(account: Account, num_prompt: int, num_completion: int) -> TooManyRequestsError:
    with pytest.raises(TooManyRequestsError) as caught:
        account.reserve(num_prompt, num_completion)
    return caught.value


def test_what_running_requests_may_use_is_reserved() -> None:
    one = account(used=10, tokens_per_day=100)
    one.reserve(20, 40)
    soon = refusal(one, 20, 11)
    assert (soon.code, soon.headers()) == ("rate_limit_exceeded", {"Retry-After": "1"})
    one.reserve(20, 10)
    assert not one.try_reserve(0, 1)
    one.release(20, 40)
    one.charge(20, 0, 30)
    assert one.try_reserve(0, 10) and not one.try_reserve(0, 1)


def test_what_does_not_fit_into_the_day_is_told_apart() -> None:
    error = refusal(account(used=10, tokens_per_day=100), 20, 71)
    assert (error.code, error.headers()) == ("insufficient_quota", {"Retry-After": "43200"})
    assert "may use 91 tokens" in error.message and "max_tokens" in error.message


def test_costs_are_reserved_as_if_nothing_were_cached() -> None:
    one = account(cost_per_day=100e-6)
    one.reserve(50, 5)
    assert not one.try_reserve(1, 0)
    one.release(50, 5)
    one.charge(50, 40, 5)
    assert one.try_reserve(30, 0) and not one.try_reserve(1, 0)


def test_without_limits_of_the_day_everything_fits() -> None:
    account(used=10**12, requests_per_minute=1).reserve(10**9, 10**9)


REQUESTS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30)), max_size=12)


@given(REQUESTS, st.integers(1, 120), st.randoms(use_true_random=False), st.booleans())
def test_requests_side_by_side_never_exceed_the_day(
    requests: list[tuple[int, int, int]], limit: int, random: Any, has_cost_limit: bool
) -> None:
    """Of each: its prompt, what of it is cached, its answer's length at most; they take turns at random."""
    limits = {"cost_per_day": limit / 1e6} if has_cost_limit else {"tokens_per_day": limit}
    one = account(**limits)
    running: list[tuple[Visit, list[int]]] = []
    for prompt, cached, length in requests:
        with suppress(TooManyRequestsError):
            one.begin()
            visit = Visit("ann", one, PRICES)
            visit.reserve(prompt, length)
            visit.charge_prompt(prompt, min(prompt, cached))
            running.append((visit, [random.randint(0, length)]))
    while running:
        visit, left = random.choice(running)
        if left[0]:
            visit.charge_token()
            left[0] -= 1
        else:
            visit.end()
            running.remove((visit, left))
        assert one._used.tokens <= limit or has_cost_limit
        assert one._used.cost <= limit / 1e6 * (1 + 1e-9) or not has_cost_limit
    assert one._reserved_prompt == one._reserved_completion == 0
