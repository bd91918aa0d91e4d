from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nybble.server.access.access import Access
from nybble.server.access.api_keys import APIKey
from nybble.server.access.prices import Prices
from nybble.server.access.usage_ledger import UsageLedger
from nybble.server.access.visit import Visit
from nybble.server.errors import APIError, ForbiddenError, TooManyRequestsError, UnauthorizedError

DAY = 86400.0
PRICES = Prices(input_price=1.0, output_price=10.0, cached_price=0.25)


@dataclass
class Clock:
    now: float = 10 * DAY

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[UsageLedger]:
    with closing(UsageLedger(tmp_path / "use.jsonl")) as ledger:
        yield ledger


def key(name: str, **limits: Any) -> APIKey:
    """Its secret is its name."""
    return APIKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **limits)


def refusal(access: Access, *authorization: str) -> APIError:
    with pytest.raises(APIError) as caught:
        access.enter(list(authorization))
    return caught.value


ANN = ["Bearer ann"]


@pytest.mark.parametrize("header", ["Bearer ann", "bearer ann", "BEARER  ann "])
def test_a_key_enters(ledger: UsageLedger, header: str) -> None:
    assert Access([key("ann")], ledger, PRICES).enter([header]).name == "ann"


@pytest.mark.parametrize(
    "headers",
    [[], [""], ["ann"], ["Bearer"], ["Bearer "], ["Basic ann"], ["Bearer bob"], ["Bearer Ann"], ["Bearerann"],
     ["Bearer ann", "Bearer ann"], ["Bearer \xff"], ["Bearer ann,Bearer ann"]],
)  # fmt: skip
def test_what_is_no_key_does_not(ledger: UsageLedger, headers: list[str]) -> None:
    error = refusal(Access([key("ann")], ledger, PRICES), *headers)
    assert isinstance(error, UnauthorizedError)
    assert (error.code, error.headers()) == ("invalid_api_key", {"WWW-Authenticate": "Bearer"})


def test_a_disabled_key(ledger: UsageLedger) -> None:
    error = refusal(Access([key("ann", enabled=False)], ledger, PRICES), *ANN)
    assert isinstance(error, ForbiddenError) and error.status == 403


def test_requests_per_minute(ledger: UsageLedger, clock: Clock) -> None:
    access = Access([key("ann", requests_per_minute=2), key("bob")], ledger, PRICES, clock, clock)
    for _ in range(2):
        access.leave(access.enter(ANN))
        clock.now += 10
    for _ in range(3):  # being refused does not count
        error = refusal(access, *ANN)
        assert isinstance(error, TooManyRequestsError)
        assert (error.code, error.headers()) == ("rate_limit_exceeded", {"Retry-After": "40"})
    access.leave(access.enter(["Bearer bob"]))
    clock.now += 40
    access.leave(access.enter(ANN))
    assert refusal(access, *ANN).headers() == {"Retry-After": "10"}


def test_concurrent_requests(ledger: UsageLedger) -> None:
    access = Access([key("ann", concurrent_requests=2)], ledger, PRICES)
    first, _ = access.enter(ANN), access.enter(ANN)
    error = refusal(access, *ANN)
    assert (error.status, error.code, error.headers()) == (429, "rate_limit_exceeded", {"Retry-After": "1"})
    access.leave(first)
    access.enter(ANN)
    refusal(access, *ANN)


@pytest.mark.parametrize("limit", [{"tokens_per_day": 30}, {"cost_per_day": 100e-6}])
def test_the_day_is_used_up_until_midnight(ledger: UsageLedger, clock: Clock, limit: dict[str, Any]) -> None:
    access = Access([key("ann", **limit)], ledger, PRICES, clock, clock)
    clock.now += DAY - 90
    visit = access.enter(ANN)
    visit.charge_prompt(20, 20 - 4 * ("cost_per_day" in limit))
    for _ in range(9):
        visit.charge_token()
    access.leave(access.enter(ANN))
    visit.charge_token()
    error = refusal(access, *ANN)
    assert (error.code, error.headers()) == ("insufficient_quota", {"Retry-After": "90"})
    access.leave(visit)
    again = Access([key("ann", **limit)], ledger, PRICES, clock, clock)  # as after a restart
    assert refusal(again, *ANN).code == "insufficient_quota"
    clock.now += 90
    for one in (access, again):
        one.leave(one.enter(ANN))


def test_use_is_written_down(ledger: UsageLedger, clock: Clock) -> None:
    access = Access([key("ann")], ledger, PRICES, clock, clock)
    visit = access.enter(ANN)
    visit.charge_prompt(20, 8)
    for _ in range(3):
        visit.charge_token()
    access.leave(visit)
    access.leave(access.enter(ANN))  # has used nothing
    (use,) = ledger.sums(10).values()
    assert (use.tokens, use.cost) == (23, pytest.approx((12 * 1.0 + 8 * 0.25 + 3 * 10.0) / 1e6))


def test_a_request_that_runs_past_midnight_counts_to_both_days(
    ledger: UsageLedger, clock: Clock, tmp_path: Path
) -> None:
    """In memory and in the ledger alike, so that a restart changes nothing."""
    keys = [key("ann", tokens_per_day=11)]
    access = Access(keys, ledger, PRICES, clock, clock)
    visit = access.enter(ANN)
    visit.charge_prompt(10, 0)
    clock.now += DAY
    visit.charge_token()
    access.leave(visit)
    assert ledger.sums(11)["ann"].tokens == 1
    assert '"prompt_tokens":10' in (tmp_path / "use-1970-01-11.jsonl").read_text()
    for one in (access, Access(keys, ledger, PRICES, clock, clock)):
        tried = one.enter(ANN)
        assert isinstance(overdraft(tried, 11), TooManyRequestsError)
        tried.reserve(10, 0)


def overdraft(visit: Visit, num_tokens: int) -> APIError:
    with pytest.raises(APIError) as caught:
        visit.reserve(num_tokens, 0)
    return caught.value


def test_keys_are_replaced_while_requests_run(ledger: UsageLedger, clock: Clock) -> None:
    access = Access([key("ann", concurrent_requests=1), key("bob")], ledger, PRICES, clock, clock)
    running = access.enter(ANN)
    access.replace_keys([key("carl"), key("ann", tokens_per_day=10)])
    assert access.enter(["Bearer carl"]).name == "carl"
    assert refusal(access, "Bearer bob").status == 401
    access.leave(access.enter(ANN))  # its new limits, its old account
    running.charge_prompt(10, 0)
    assert refusal(access, *ANN).code == "insufficient_quota"
    access.replace_keys([])
    assert refusal(access, *ANN).status == 401
    access.leave(running)
    assert ledger.sums(10)["ann"].tokens == 10
    access.replace_keys([key("ann", tokens_per_day=10)])  # gone and back, it has not forgotten
    assert refusal(access, *ANN).code == "insufficient_quota"


def test_a_key_that_comes_back_has_what_it_used_before_the_start(ledger: UsageLedger, clock: Clock) -> None:
    first = Access([key("ann")], ledger, PRICES, clock, clock)
    visit = first.enter(ANN)
    visit.charge_prompt(10, 0)
    first.leave(visit)
    access = Access([], ledger, PRICES, clock, clock)
    access.replace_keys([key("ann", tokens_per_day=10)])
    assert refusal(access, *ANN).code == "insufficient_quota"
    late = Access([], ledger, PRICES, clock, clock)
    clock.now += DAY
    late.replace_keys([key("ann", tokens_per_day=10)])
    late.enter(ANN)


def test_wrong_keys_are_counted_by_address(ledger: UsageLedger, clock: Clock) -> None:
    access = Access([key("ann")], ledger, PRICES, clock, clock, max_failed_attempts=2)
    for _ in range(3):  # no key at all is no guess
        with pytest.raises(UnauthorizedError):
            access.enter([], "10.0.0.1")
    statuses = []
    for _ in range(4):
        with pytest.raises(APIError) as caught:
            access.enter(["Bearer guess"], "10.0.0.1")
        statuses.append(caught.value.status)
    assert statuses == [401, 401, 429, 429]
    with pytest.raises(TooManyRequestsError) as refused:  # not even a right guess is told
        access.enter(ANN, "10.0.0.1")
    assert refused.value.headers() == {"Retry-After": "60"}
    access.enter(ANN, "10.0.0.2")
