from __future__ import annotations

from nybble.engine.scheduling.fair_share import FairShare


def test_counts_tokens_by_tenant() -> None:
    shares = FairShare(max_lag=100)
    shares.arrive("a")
    shares.arrive("b")
    shares.charge("a", 30)
    shares.charge("a", 5)
    shares.charge("b", 7)
    assert (shares.served("a"), shares.served("b")) == (35, 7)


def test_who_comes_late_is_lifted_to_max_lag_behind_the_foremost() -> None:
    shares = FairShare(max_lag=100)
    shares.arrive("a")
    shares.charge("a", 5000)
    shares.arrive("b")
    assert shares.served("b") == 4900


def test_who_comes_back_soon_keeps_what_it_was_charged() -> None:
    shares = FairShare(max_lag=100)
    shares.arrive("a")
    shares.arrive("b")
    shares.charge("a", 5000)
    shares.charge("b", 4950)
    shares.leave("b")
    shares.arrive("b")
    assert shares.served("b") == 9850  # 4950 on top of the 4900 to which it was lifted
    assert shares.served("a") == 5000


def test_who_waited_long_is_lifted_when_it_is_served() -> None:
    shares = FairShare(max_lag=100)
    shares.arrive("a")
    shares.arrive("b")
    shares.charge("a", 5000)
    assert shares.served("b") == 0
    shares.charge("b", 1)
    assert shares.served("b") == 4901


def test_a_tenant_is_present_while_it_has_requests() -> None:
    shares = FairShare(max_lag=100)
    shares.arrive("a")
    shares.arrive("a")
    shares.leave("a")
    shares.charge("a", 10)
    assert shares.served("a") == 10


def test_tenants_are_forgotten_when_they_are_as_far_behind_as_the_unknown() -> None:
    shares = FairShare(max_lag=100)
    for number in range(10_000):
        tenant = f"tenant {number}"
        shares.arrive(tenant)
        shares.charge(tenant, 101)
        shares.leave(tenant)
        assert len(shares) < 102
    shares.arrive("tenant 0")
    assert shares.served("tenant 0") == shares.served("tenant 9999") - 100


def test_no_more_than_a_thousand_absent_tenants_are_remembered() -> None:
    shares = FairShare(max_lag=100)
    for number in range(2000):
        tenant = f"tenant {number}"
        shares.arrive(tenant)
        shares.charge(tenant, 1)
        shares.leave(tenant)
    assert len(shares) == 1000
    assert shares.served("tenant 1000") == shares.served("tenant 1999") == 1
