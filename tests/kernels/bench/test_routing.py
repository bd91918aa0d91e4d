"""Routings of benchmark cases: distinct experts, the same each time, skewed where they should be."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels.bench.routing import expert_counts, expert_ids


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_ids(routing: str) -> None:
    ids = expert_ids(300, 160, 8, routing)
    assert ids.dtype == torch.int32 and ids.shape == (300, 8)
    assert ids.min() >= 0 and ids.max() < 160
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert torch.equal(ids, expert_ids(300, 160, 8, routing))


def test_counts() -> None:
    ids = torch.tensor([[0, 3], [3, 1]], dtype=torch.int32)
    assert expert_counts(ids, 5) == [1, 1, 0, 2, 0]


def test_distinct_experts_are_as_many_as_expected() -> None:
    used = sum(count > 0 for count in expert_counts(expert_ids(8, 160, 8, "uniform"), 160))
    assert used == pytest.approx(160 * (1 - (1 - 8 / 160) ** 8), rel=0.1)


def test_zipf_prefers_few_experts() -> None:
    counts = {
        routing: sorted(expert_counts(expert_ids(2000, 160, 8, routing), 160), reverse=True)
        for routing in ("uniform", "zipf")
    }
    assert counts["zipf"][0] > 4 * counts["uniform"][0]
    # Of one draw the first expert has a share of 1 / H(160), the tenth a tenth of it.
    assert counts["zipf"][0] > 3 * counts["zipf"][9]
