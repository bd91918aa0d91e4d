"""Picks against the reference's, which are those of the mathematics: see its tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from poison import poisoned as poisoned
from sampling_rows import normal, reference_picks, request_batch
from torch import Tensor

from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.sampling import is_unfiltered, sample_unfiltered
from nybble.kernels.ops import SamplingBatch

OFF = (0, 1.0, 0.0)


def _batch(*temperatures: float, seed: int = 0) -> SamplingBatch:
    return request_batch(*((temperature, *OFF) for temperature in temperatures), seed=seed)


def _picks(pool: Pool, logits: Tensor, batch: SamplingBatch, num_token_ids: int | None = None) -> list[int]:
    count = num_token_ids or logits.shape[1]
    return sample_unfiltered(pool, logits, batch.temperatures, batch.draws, count).tolist()


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200, 16_385])
def test_rows_of_any_width(pool: Pool, width: int) -> None:
    logits = normal(9, width, scale=3)
    batch = _batch(0, 1, 0.3, 0, 2, 100, 1e-3, 1, 0, seed=width)
    assert _picks(pool, logits, batch) == reference_picks(logits, batch)


@pytest.mark.parametrize(("scale", "temperature"), [(0.0, 1.0), (0.1, 0.2), (1.0, 1.0), (8.0, 3.0)])
def test_many_draws(pool: Pool, scale: float, temperature: float) -> None:
    """Flat rows, of which any column can be picked, and peaked ones."""
    logits = normal(400, 1000, scale=scale)
    batch = _batch(*[temperature] * 400, seed=3)
    picks = _picks(pool, logits, batch)
    assert picks == reference_picks(logits, batch)
    assert len(set(picks)) > 100


def test_a_full_vocabulary(pool: Pool) -> None:
    logits = normal(3, 151_552, scale=4)
    batch = _batch(1.0, 0.0, 0.6)
    assert _picks(pool, logits, batch) == reference_picks(logits, batch)


def test_columns_beyond_the_vocabulary_are_not_picked(pool: Pool) -> None:
    logits = normal(2, 300)
    logits[:, 250:] = 1e9
    batch = _batch(0.0, 1.0)
    assert _picks(pool, logits, batch, 250) == reference_picks(logits, batch, 250)


def test_the_first_of_equals_is_picked(pool: Pool) -> None:
    logits = torch.zeros(2, 40_000)
    logits[0, [33_000, 20_000, 39_999]] = 1.0
    assert _picks(pool, logits, _batch(0.0, 0.0)) == [20_000, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masked_infinite_and_undefined_logits(pool: Pool, temperature: float) -> None:
    logits = normal(4, 20_000)
    logits[0, torch.arange(20_000) != 17_000] = -torch.inf
    logits[1, 18_000] = torch.inf
    logits[2] = -torch.inf
    logits[3, 19_000] = torch.nan
    batch = _batch(*[temperature] * 4)
    picks = _picks(pool, logits, batch)
    assert picks[:3] == reference_picks(logits, batch)[:3] == [17_000, 18_000, 0]
    assert picks[3] == 19_000  # so that the row is seen to be broken


def test_a_row_does_not_depend_on_others_or_on_threads(pool: Pool) -> None:
    logits = normal(5, 50_000)
    batch = _batch(1.0, 0.0, 0.5, 2.0, 1.0)
    together = _picks(pool, logits, batch)
    with Pool(1, pool.level) as alone:
        rows = [
            _picks(
                alone,
                logits[row : row + 1],
                replace(
                    batch, temperatures=batch.temperatures[row : row + 1], draws=batch.draws[row : row + 1]
                ),
            )[0]
            for row in range(5)
        ]
    assert rows == together


def test_filters_are_recognized() -> None:
    batch = request_batch((1.0, *OFF), (1.0, 5, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.1))
    assert is_unfiltered(batch).tolist() == [True, False, False, False]


def test_what_does_not_fit_is_named(pool: Pool) -> None:
    logits, batch = normal(2, 10), _batch(1.0, 1.0)
    with pytest.raises(ValueError, match="num_token_ids is 11, expected 1 to 10 columns"):
        _picks(pool, logits, batch, 11)
    with pytest.raises(ValueError, match=r"temperatures is torch\.float32"):
        _picks(pool, logits, _batch(1.0))
    with pytest.raises(ValueError, match=r"logits is torch\.float64"):
        _picks(pool, logits.double(), batch)
