"""min_p, top_k and top_p against the reference: each alone, together, at borders, among equal logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from poison import poisoned as poisoned
from sampling_rows import normal, picks, reference_picks, repeated, request_batch, small_launch
from torch import Tensor
from triton_device import DEVICE

# temperature, top_k, top_p, min_p
FILTERS = [
    (1.0, 1, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (2.0, 64, 1.0, 0.0),
    (3.0, 300, 1.0, 0.0),
    (1.0, 5000, 1.0, 0.0),
    (1.0, 0, 0.0, 0.0),
    (1.0, 0, 0.3, 0.0),
    (1.0, 0, 0.95, 0.0),
    (2.0, 0, 0.999, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (1.5, 0, 0.7, 0.02),
    (0.7, 30, 1.0, 0.1),
    (1.5, 40, 0.8, 0.0),
    (1.5, 12, 0.8, 0.05),
    (0.7, 3, 0.6, 0.01),
]


def _some_impossible(logits: Tensor) -> Tensor:
    logits[:, ::3] = -torch.inf
    return logits


def _of_few_values(logits: Tensor) -> Tensor:
    return (logits * 2).round() / 2


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_each_filter(filters: tuple[float, int, float, float]) -> None:
    logits, batch = normal(1, 900, scale=2), request_batch(filters)
    assert picks(logits, batch, launch=small_launch()) == reference_picks(logits, batch)


@pytest.mark.parametrize(("change", "scale"), [(_some_impossible, 4.0), (_of_few_values, 0.3)])
def test_filters_side_by_side(change: Callable[[Tensor], Tensor], scale: float) -> None:
    logits, batch = change(normal(16, 700, seed=5, scale=scale)), repeated(FILTERS, 16)
    assert picks(logits, batch, launch=small_launch()) == reference_picks(logits, batch)


@pytest.mark.parametrize("filters", [(3.0, 200, 0.9, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.3)], ids=str)
def test_a_list_of_several_tiles(filters: tuple[float, int, float, float]) -> None:
    logits, batch = normal(2, 400, scale=0.3), repeated([filters], 2)
    assert picks(logits, batch, launch=small_launch(64, 128)) == reference_picks(logits, batch)


@pytest.mark.parametrize("top_k", [1, 2, 64, 65, 299, 300, 2**40])
def test_of_equal_logits_top_k_keeps_the_first(top_k: int) -> None:
    """Enough rows to see all sides of the border; logits of 0 are where the bits of floats change most."""
    logits, batch = torch.zeros(5, 300, device=DEVICE), repeated([(1.0, top_k, 1.0, 0.0)], 5)
    found = picks(logits, batch, launch=small_launch())
    assert max(found) < top_k
    assert found == reference_picks(logits, batch)


@pytest.mark.parametrize("top_p", [0.0, 1e-7, 0.25, 0.7501])
@pytest.mark.parametrize("value", [-7.0, 0.0])
def test_of_equal_logits_top_p_keeps_the_first(top_p: float, value: float) -> None:
    logits = torch.full((4, 256), -torch.inf, device=DEVICE)
    logits[:, ::2] = value
    batch = repeated([(1.0, 0, top_p, 0.0), (1.0, 100, top_p, 0.0)], 4)
    assert picks(logits, batch, launch=small_launch()) == reference_picks(logits, batch)


def test_equal_logits_at_the_border_of_one_filter_and_then_of_another() -> None:
    """3, 2, 2, 2, 2, 1, ...: top_k ends among the twos, and top_p sooner among them."""
    logits = torch.full((12, 200), -3.0, device=DEVICE)
    logits[:, 150], logits[:, [20, 90, 91, 199]], logits[:, 5] = 3.0, 2.0, 1.0
    borders = [(3, 1.0), (4, 0.8), (5, 0.75), (6, 0.97), (0, 0.6), (0, 0.9)]
    batch = repeated([(1.0, top_k, top_p, 0.0) for top_k, top_p in borders], 12)
    assert picks(logits, batch, launch=small_launch()) == reference_picks(logits, batch)


def test_the_winner_of_all_tokens_at_the_border() -> None:
    """Filters that just keep, and just drop, the token that wins without them."""
    logits = normal(1, 400, seed=2)
    (winner,) = picks(logits, request_batch((1.0, 0, 1.0, 0.0)))
    is_before = logits[0] > logits[0, winner]
    rank, mass = int(is_before.sum()), float(logits[0].double().softmax(0)[is_before].sum())
    assert rank > 3  # otherwise this says little
    for top_k, top_p, keeps in [
        (rank + 1, 1.0, True),
        (rank, 1.0, False),
        (0, mass * 1.0001, True),
        (0, mass * 0.9999, False),
    ]:
        batch = request_batch((1.0, top_k, top_p, 0.0))
        (pick,) = picks(logits, batch)
        assert [pick] == reference_picks(logits, batch)
        assert (pick == winner) == keeps


def test_the_winner_among_equal_logits_at_the_border() -> None:
    """Before it lies exactly, or nearly, the share that top_p asks for; most of it not in the first tile."""
    logits, launch = torch.zeros(1, 256, device=DEVICE), small_launch(64, 64)
    (winner,) = picks(logits, request_batch((1.0, 0, 1.0, 0.0), seed=3))
    assert winner > 128
    for share, keeps in [(winner / 256, False), ((winner + 0.01) / 256, True)]:
        batch = request_batch((1.0, 0, share, 0.0), seed=3)
        (pick,) = picks(logits, batch, launch=launch)
        assert [pick] == reference_picks(logits, batch)
        assert (pick == winner) == keeps


def test_equal_logits_in_several_tiles() -> None:
    logits, batch = torch.zeros(4, 192, device=DEVICE), repeated([(1.0, 70, 1.0, 0.0)], 4)
    found = picks(logits, batch, launch=small_launch(64, 64))
    assert max(found) < 70
    assert found == reference_picks(logits, batch)


def test_more_segments_than_a_tile_has_logits() -> None:
    logits, batch = normal(3, 4300, scale=3), repeated([(1.0, 3, 1.0, 0.0)], 3)
    assert picks(logits, batch, launch=small_launch(2048, 64)) == reference_picks(logits, batch)


def test_a_flat_row_lists_all_its_segments() -> None:
    logits, batch = normal(1, 2100, seed=9, scale=0.2), request_batch((1.0, 0, 0.9, 0.0))
    assert picks(logits, batch, launch=small_launch(1024, 1024)) == reference_picks(logits, batch)


def test_a_peaked_row_lists_few() -> None:
    filters = [(0.5, 50, 1.0, 0.0), (0.5, 50, 0.5, 0.0), (0.5, 0, 0.3, 0.0), *[(1.0, 0, 0.1, 1e-3)] * 4]
    logits, batch = normal(len(filters), 4099, seed=9, scale=1.5), request_batch(*filters)
    assert picks(logits, batch, launch=small_launch(2048, 4096)) == reference_picks(logits, batch)


def test_logits_of_all_magnitudes() -> None:
    """The search goes by the bits of floats: across zero, and among the smallest and largest."""
    exponents = torch.linspace(-44, 38, 500)
    row = torch.cat((-(10.0**exponents), 10.0**exponents))
    logits = row[torch.randperm(1000, generator=torch.Generator().manual_seed(0))].expand(2, -1).to(DEVICE)
    for top_k in (3, 490, 505, 900):
        found = picks(logits, repeated([(1e30, top_k, 1.0, 0.0)], 2), launch=small_launch())
        kept = logits[0].sort(descending=True, stable=True).indices[:top_k].tolist()
        assert set(found) <= set(kept)
