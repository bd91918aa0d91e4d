from __future__ import annotations

import hashlib

import pytest

from nybble.server.access.account import Account
from nybble.server.access.api_keys import APIKey
from nybble.server.access.prices import Prices
from nybble.server.access.usage_ledger import DayUse
from nybble.server.access.visit import Visit

PRICES = Prices(input_price=1.0, output_price=10.0, cached_price=0.25)


@pytest.fixture
def account() -> Account:
    key = APIKey(name="ann", sha256=hashlib.sha256(b"ann").hexdigest(), tokens_per_day=100)
    return Account(key, DayUse(), PRICES, lambda: 0.0, lambda: 0.0)


def test_what_is_left_of_a_reservation_is_given_back(account: Account) -> None:
    account.begin()
    visit = Visit("ann", account, PRICES)
    visit.reserve(40, 60)
    assert not account.try_reserve(1, 0)
    visit.charge_prompt(40, 10)
    for _ in range(20):
        visit.charge_token()
    assert not account.try_reserve(0, 1)
    visit.end()
    assert account.try_reserve(40, 0) and not account.try_reserve(1, 0)
    (entry,) = visit.entries(5.0)
    assert (entry.time, entry.key) == (5.0, "ann")
    assert (entry.prompt_tokens, entry.cached_tokens, entry.completion_tokens) == (40, 10, 20)
    assert entry.cost == pytest.approx((30 * 1.0 + 10 * 0.25 + 20 * 10.0) / 1e6)


def test_more_than_was_reserved_is_charged_too(account: Account) -> None:
    """What has been computed counts, whatever was expected."""
    account.begin()
    visit = Visit("ann", account, PRICES)
    visit.charge_prompt(10, 0)
    visit.charge_token()
    visit.end()
    assert account.try_reserve(89, 0) and not account.try_reserve(1, 0)


def test_tokens_one_by_one_until_none_is_left(account: Account) -> None:
    account.begin()
    visit = Visit("ann", account, PRICES)
    visit.reserve(90, 1)
    visit.charge_prompt(90, 0)
    num_tokens = 1
    while True:
        visit.charge_token()
        if not visit.reserve_token():
            break
        num_tokens += 1
    assert num_tokens == 10


def test_a_request_without_tokens_leaves_no_entry(account: Account) -> None:
    account.begin()
    visit = Visit("ann", account, PRICES)
    visit.reserve(40, 60)
    visit.end()
    assert visit.entries(5.0) == []
