from __future__ import annotations

import pytest
import torch

from nybble.kernels.cpu.add import add
from nybble.kernels.cpu.pool import Pool


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 100), (65, 576)])
def test_the_sum_takes_the_place_of_the_first(pool: Pool, shape: tuple[int, int]) -> None:
    hidden, update = torch.randn(2, *shape)
    expected, before = hidden + update, update.clone()
    assert add(pool, hidden, update) is hidden
    assert torch.equal(hidden, expected)
    assert torch.equal(update, before)


def test_what_does_not_fit_is_named(pool: Pool) -> None:
    with pytest.raises(ValueError, match=r"update is torch\.float32 \[2, 7\]"):
        add(pool, torch.zeros(2, 8), torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"hidden is .* strided"):
        add(pool, torch.zeros(8, 2).T, torch.zeros(2, 8))
