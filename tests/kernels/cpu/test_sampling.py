"""Picks against the reference's, which are those of the mathematics: see its tests."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies
from poison import poisoned as poisoned
from sampling_rows import normal, reference_picks, repeated, request_batch
from torch import Tensor

from nybble.kernels.cpu.native_library import native_library
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.sampling import sample
from nybble.kernels.ops import SamplingBatch

Request = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p

OFF = (0, 1.0, 0.0)
FILTERS = list(itertools.product([0, 1, 7, 300], [1.0, 0.0, 0.4, 0.95], [0.0, 0.003, 0.2]))
VOCABULARY = 151_552  # of GLM-4.7


def _batch(*temperatures: float, seed: int = 0) -> SamplingBatch:
    return request_batch(*((temperature, *OFF) for temperature in temperatures), seed=seed)


def _picks(pool: Pool, logits: Tensor, batch: SamplingBatch, num_token_ids: int | None = None) -> list[int]:
    return sample(pool, logits, batch, num_token_ids or logits.shape[1]).tolist()


def _rows(batch: SamplingBatch, rows: slice) -> SamplingBatch:
    return SamplingBatch(**{name: column[rows] for name, column in vars(batch).items()})


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


@pytest.mark.parametrize("temperature", [0.3, 1.0, 40.0])
@pytest.mark.parametrize(("width", "scale"), [(1, 1.0), (5, 1.0), (65, 3.0), (1000, 3.0), (16_450, 1.0)])
def test_every_combination_of_filters(pool: Pool, width: int, scale: float, temperature: float) -> None:
    batch = request_batch(*((temperature, *filters) for filters in FILTERS), seed=width)
    logits = normal(len(FILTERS), width, scale=scale)
    assert _picks(pool, logits, batch) == reference_picks(logits, batch)


@pytest.mark.parametrize(
    "request_", [(1.0, 50, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.05), (1.0, 50, 0.8, 0.05)]
)
@pytest.mark.parametrize("grid", [None, 4])
def test_many_filtered_draws(pool: Pool, request_: Request, grid: int | None) -> None:
    """Of rows without equal logits, and with many."""
    logits = normal(200, 1000, scale=2)
    logits = logits if grid is None else (logits * grid).round() / grid
    batch = repeated([request_], 200)
    picks = _picks(pool, logits, batch)
    assert picks == reference_picks(logits, batch)
    assert len(set(picks)) > 60


def test_a_full_vocabulary(pool: Pool) -> None:
    logits = normal(6, VOCABULARY, scale=4)
    batch = request_batch(
        (1.0, *OFF),
        (0.0, *OFF),
        (0.6, *OFF),
        (1.0, 0, 0.95, 0.0),
        (0.7, 40, 1.0, 0.0),
        (1.0, 1000, 0.9, 0.001),
    )
    assert _picks(pool, logits, batch) == reference_picks(logits, batch)


def test_columns_beyond_the_vocabulary_are_not_picked(pool: Pool) -> None:
    logits = normal(3, 300)
    logits[:, 250:] = 1e9
    batch = request_batch((0.0, *OFF), (1.0, *OFF), (1.0, 200, 0.9, 0.0))
    assert _picks(pool, logits, batch, 250) == reference_picks(logits, batch, 250)


def test_the_first_of_equals_is_picked(pool: Pool) -> None:
    logits = torch.zeros(2, 40_000)
    logits[0, [33_000, 20_000, 39_999]] = 1.0
    assert _picks(pool, logits, _batch(0.0, 0.0)) == [20_000, 0]


def test_of_equals_the_first_are_kept(pool: Pool) -> None:
    """Column 35,000 leads, then come all others alike: those before the border can be picked, no other."""
    logits = torch.zeros(100, 40_000)
    logits[:, 35_000] = 1.0
    for request_, border in (((1.0, 20_001, 1.0, 0.0), 20_000), ((1.0, 0, 0.75, 0.0), 30_000)):
        batch = repeated([request_], 100)
        picks = _picks(pool, logits, batch)
        assert picks[:20] == reference_picks(logits[:20], _rows(batch, slice(20)))
        assert border * 0.95 < max(set(picks) - {35_000}) < border


def test_half_of_equals_weighs_half(pool: Pool) -> None:
    """Sums are exact: the token before which there is half of the weight is dropped."""
    batch = repeated([(1.0, 0, 0.5, 0.0)], 500)
    assert max(_picks(pool, torch.zeros(500, 20), batch)) == 9


@pytest.mark.parametrize("scale", [1e-6, 1e-4])
def test_filters_tell_close_logits_apart(pool: Pool, scale: float) -> None:
    logits = normal(100, 3000, scale=scale)
    batch = repeated([(1.0, 100, 1.0, 0.0), (0.5, 0, 0.3, 0.0), (2.0, 1500, 0.5, 0.0)], 100)
    assert _picks(pool, logits, batch) == reference_picks(logits, batch)


def test_top_p_may_end_among_unlikely_tokens(pool: Pool) -> None:
    """One token has most of the weight; of the rest, some 17 below it, a part is kept."""
    logits = normal(100, 40_000, scale=0.5) - 11
    logits[:, 500] = 6.0
    batch = repeated([(1.0, 0, 0.999, 0.0), (2.5, 0, 0.999, 0.0)], 100)
    picks = _picks(pool, logits, batch)
    assert picks == reference_picks(logits, batch)
    assert len(set(picks)) > 30


@pytest.mark.parametrize("filters", [OFF, (5, 0.9, 0.01)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masked_infinite_and_undefined_logits(
    pool: Pool, temperature: float, filters: tuple[int, float, float]
) -> None:
    logits = normal(4, 20_000)
    logits[0, torch.arange(20_000) != 17_000] = -torch.inf
    logits[1, 18_000] = torch.inf
    logits[2] = -torch.inf
    logits[3, 19_000] = torch.nan
    batch = repeated([(temperature, *filters)], 4)
    picks = _picks(pool, logits, batch)
    assert picks[:3] == reference_picks(logits, batch)[:3] == [17_000, 18_000, 0]
    assert picks[3] == 19_000  # so that the row is seen to be broken


@pytest.mark.parametrize("temperature", [1e-39, 1e-5, 1e20, 3e38])
def test_extreme_temperatures(pool: Pool, temperature: float) -> None:
    logits = normal(48, 200, scale=5)
    logits[:, ::3] = -torch.inf
    batch = request_batch(*((temperature, *filters) for filters in FILTERS))
    assert _picks(pool, logits, batch) == reference_picks(logits, batch)


def _distance_to_border(logits: Tensor, request: Request) -> float:
    """How close min_p or top_p comes to a token; they may differ from the reference below some 1e-7."""
    temperature, top_k, top_p, min_p = request
    scaled = (logits - logits.max()) / temperature
    weights = scaled.double().exp().sort(descending=True).values
    distances = (weights - min_p).abs()[weights < 1]
    kept = weights[weights >= min_p][: top_k or None]
    before = kept.cumsum(0) - kept
    distances = torch.cat((distances, (before / kept.sum() - top_p).abs()[1:], torch.ones(1)))
    return float(distances.min())


@hypothesis.given(
    logits=strategies.lists(
        strategies.integers(-40, 40).map(lambda x: x / 4)
        | strategies.sampled_from([-torch.inf, -1e30, 30.0]),
        min_size=1,
        max_size=150,
    ),
    temperature=strategies.floats(0.0625, 64, width=32),
    top_k=strategies.integers(0, 160),
    top_p=strategies.just(1.0) | strategies.floats(0, 1, width=32),
    min_p=strategies.just(0.0) | strategies.floats(0, 1, width=32),
    seed=strategies.integers(0, 1 << 62),
)
@hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=150
)
def test_any_row(
    pool: Pool, logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    row, request_ = torch.tensor([logits]), (temperature, top_k, top_p, min_p)
    hypothesis.assume(row.max().isfinite() and _distance_to_border(row[0], request_) > 1e-6)
    batch = repeated([request_], 16)
    batch = SamplingBatch(**{**vars(batch), "draws": batch.draws + seed})
    rows = row.repeat(16, 1)
    assert _picks(pool, rows, batch) == reference_picks(rows, batch)


def test_a_row_does_not_depend_on_others_or_on_threads(pool: Pool) -> None:
    logits = normal(8, 50_000)
    batch = request_batch(
        (1.0, *OFF), (0.0, *OFF), (0.5, 50, 1.0, 0.0), (2.0, *OFF), (1.0, 0, 0.9, 0.0), (0.0, 9, 0.5, 0.1),
        (1.0, 10_000, 0.5, 0.0), (1.0, 0, 1.0, 0.1),
    )  # fmt: skip
    together = _picks(pool, logits, batch)
    for num_threads in (1, 3):
        with Pool(num_threads, pool.level) as other:
            rows = [slice(row, row + 1) for row in range(8)]
            assert [_picks(other, logits[row], _rows(batch, row))[0] for row in rows] == together


def test_levels_agree_at_borders() -> None:
    """Rows of equal logits: rounding alone decides how many tokens top_p keeps."""
    logits = (torch.arange(300) % 7 / 8).unsqueeze(1).repeat(1, 997)
    logits[:, 0] += 0.3
    batch = repeated([(0.7, 0, 0.1 * tenths, 0.0) for tenths in range(1, 10)], 300)
    found = []
    for level in native_library().levels:
        with Pool(1, level) as pool:
            found.append(_picks(pool, logits, batch))
    assert all(picks == found[0] for picks in found)


def test_what_does_not_fit_is_named(pool: Pool) -> None:
    logits, batch = normal(2, 10), _batch(1.0, 1.0)
    with pytest.raises(ValueError, match="num_token_ids is 11, expected 1 to 10 columns"):
        _picks(pool, logits, batch, 11)
    with pytest.raises(ValueError, match=r"temperatures is torch\.float32"):
        _picks(pool, logits, _batch(1.0))
    with pytest.raises(ValueError, match=r"logits is torch\.float64"):
        _picks(pool, logits.double(), batch)
    for name, column in vars(batch).items():
        with pytest.raises(ValueError, match=name):
            _picks(pool, logits, SamplingBatch(**{**vars(batch), name: column.to(torch.int32)}))
    with pytest.raises(ValueError, match="expected at most 4194304"):
        _picks(pool, torch.zeros(1, 1).expand(1, 5_000_000), _batch(1.0))
