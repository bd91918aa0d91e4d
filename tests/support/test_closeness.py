from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from torch import Tensor

EXPECTED = torch.tensor([[3.0, -3.0], [3.0, -3.0]])  # RMS 3


def test_within_both_bounds() -> None:
    assert_close(EXPECTED + 0.3, EXPECTED, max_error=0.11, rms_error=0.11)
    assert_close(EXPECTED.bfloat16(), EXPECTED, max_error=0, rms_error=0)
    assert_close(torch.empty(0, 3), torch.empty(0, 3), max_error=0, rms_error=0)


def test_one_large_error_is_shown_with_its_place() -> None:
    actual = EXPECTED.clone()
    actual[1, 0] = 3.9
    with pytest.raises(AssertionError, match=r"largest error 0\.3 .*\n  \[1, 0\]: 3\.9\d*, expected 3\n"):
        assert_close(actual, EXPECTED, max_error=0.2, rms_error=1)


def test_many_small_errors() -> None:
    with pytest.raises(AssertionError, match=r"RMS error 0\.1 \(allowed 0\.05\)"):
        assert_close(EXPECTED + 0.3, EXPECTED, max_error=1, rms_error=0.05)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (EXPECTED.flatten(), EXPECTED, r"shape \(4,\), expected \(2, 2\)"),
        (EXPECTED.where(EXPECTED > 0, torch.nan), EXPECTED, r"actual .* at \[\[0, 1\], \[1, 1\]\], 2 in all"),
        (EXPECTED, EXPECTED / 0, "expected has numbers that are not finite"),
        (torch.full((2, 2), 1e-30), torch.zeros(2, 2), "largest error inf"),
    ],
)
def test_refused_whatever_the_bounds(actual: Tensor, expected: Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected, max_error=1e30, rms_error=1e30)
