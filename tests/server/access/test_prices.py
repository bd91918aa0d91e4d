from __future__ import annotations

import pytest

from nybble.server.access.prices import Prices

PRICES = Prices(input_price=2.0, output_price=8.0, cached_price=0.5)


@pytest.mark.parametrize(
    ("num_prompt", "num_cached", "num_completion", "dollars"),
    [
        (0, 0, 0, 0.0),
        (1_000_000, 0, 0, 2.0),
        (1_000_000, 1_000_000, 0, 0.5),
        (0, 0, 1_000_000, 8.0),
        (1_000, 600, 100, (400 * 2.0 + 600 * 0.5 + 100 * 8.0) / 1e6),
    ],
)
def test_cost(num_prompt: int, num_cached: int, num_completion: int, dollars: float) -> None:
    assert PRICES.cost(num_prompt, num_cached, num_completion) == pytest.approx(dollars, rel=1e-12)


def test_a_sum_has_no_noise_of_binary_fractions() -> None:
    """0.43 * 32 + 1.75 * 2 is 17.259999999999998 in floating point."""
    assert repr(Prices().cost(32, 0, 2)) == "1.726e-05"


def test_the_default_table() -> None:
    assert Prices().cost(1_000_000, 500_000, 1_000_000) == pytest.approx(0.215 + 0.04 + 1.75)
