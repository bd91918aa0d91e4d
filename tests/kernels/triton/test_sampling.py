"""Sampling without filters, rows of infinities and NaN, launches. Filters: test_triton_token_filter."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned as poisoned
from sampling_rows import normal, picks, reference_picks, repeated, request_batch, small_launch
from triton_device import DEVICE

from nybble.kernels.ops import SamplingBatch
from nybble.kernels.triton.launch import KernelLaunch, recorded_launches
from nybble.kernels.triton.sampling import sample, sampling_launch

GREEDY, DRAWN, FILTERED = (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.01)
SIZES = [(1, 1), (7, 5), (64, 64), (1000, 999), (4099, 4001)]  # columns, token ids
VOCABULARY, NUM_TOKEN_IDS = 151_552, 151_365  # of GLM-4.7


@pytest.mark.parametrize(("num_columns", "num_token_ids"), SIZES)
def test_picks_are_those_of_the_reference(num_columns: int, num_token_ids: int) -> None:
    temperatures = [0.0, 0.3, 0.7, 1.0, 1.5, 40.0]
    batch = request_batch(*((t, 0, 1.0, 0.0) for t in temperatures), seed=num_columns)
    logits = normal(6, num_columns, scale=3)
    assert picks(logits, batch, num_token_ids) == reference_picks(logits, batch, num_token_ids)


def test_picks_differ_by_their_random_bits() -> None:
    logits, batch = normal(1, 50, scale=0.1).expand(12, -1), repeated([DRAWN], 12)
    found = picks(logits, batch)
    assert found == reference_picks(logits, batch)
    assert len(set(found)) > 6


@pytest.mark.parametrize("rubbish", [1e9, torch.inf, torch.nan])
@pytest.mark.parametrize("request_", [GREEDY, DRAWN, FILTERED], ids=["greedy", "drawn", "filtered"])
def test_padding_is_never_picked(request_: tuple[float, int, float, float], rubbish: float) -> None:
    logits, batch = normal(3, 300), repeated([request_], 3)
    logits[:, 170:] = rubbish
    assert picks(logits, batch, 170, small_launch()) == reference_picks(logits, batch, 170)


def test_rows_may_be_apart() -> None:
    wide, batch = normal(5, 400), repeated([GREEDY, DRAWN, FILTERED], 5)
    logits = wide[:, 17:317]
    expected = reference_picks(logits.clone(), batch)
    wide[:, :17], wide[:, 317:] = torch.nan, torch.nan
    assert picks(logits, batch, launch=small_launch()) == expected


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits, batch = normal(6, 500), repeated([GREEDY, DRAWN, FILTERED], 6)
    alone = [
        picks(logits[row : row + 1], SamplingBatch(**{k: v[row : row + 1] for k, v in vars(batch).items()}))[
            0
        ]
        for row in range(6)
    ]
    assert picks(logits, batch) == alone


def test_logits_stay_as_they_are() -> None:
    logits = normal(3, 300)
    before = logits.clone()
    picks(logits, repeated([GREEDY, DRAWN, FILTERED], 3))
    assert logits.equal(before)


@pytest.mark.parametrize(("chunk", "tile"), [(64, 64), (256, 512), (1024, 64)])
def test_picks_do_not_depend_on_the_launch_configuration(chunk: int, tile: int) -> None:
    logits, batch = normal(3, 300, scale=2), repeated([DRAWN, FILTERED, (1.3, 0, 0.8, 0.0)], 3)
    assert picks(logits, batch, launch=small_launch(chunk, tile)) == reference_picks(logits, batch)


def test_two_runs_agree() -> None:
    logits, batch = normal(4, 3000, scale=0.5), repeated([DRAWN, FILTERED, (1.0, 0, 0.95, 0.0)], 4)
    assert picks(logits, batch) == picks(logits, batch)


def test_of_equal_logits_greedy_takes_the_first() -> None:
    logits = torch.zeros(3, 300, device=DEVICE)
    logits[0, [77, 200]], logits[1, [130, 131]], logits[2, 0] = 3.0, 3.0, -0.0
    assert picks(logits, repeated([GREEDY], 3), launch=small_launch()) == [77, 130, 0]


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 5e-38, 1e-39])
def test_a_tiny_temperature_picks_the_likeliest_token(temperature: float) -> None:
    logits = normal(4, 200, scale=5)
    requests = [(temperature, 0, 1.0, 0.0), (temperature, 3, 0.9, 0.1)]
    assert picks(logits, repeated(requests, 4), launch=small_launch()) == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("temperature", [1e20, 3e38, torch.inf])
def test_a_huge_temperature_makes_all_tokens_alike(temperature: float) -> None:
    logits = normal(4, 200, scale=5)
    logits[:, ::2] = -torch.inf
    batch = repeated([(temperature, 0, 1.0, 0.0), (temperature, 7, 1.0, 0.0)], 4)
    alike = torch.where(logits.isinf(), logits, 0.0)
    assert picks(logits, batch)[::2] == reference_picks(alike, repeated([DRAWN], 4))[::2]
    likeliest = logits.topk(7).indices.tolist()
    assert all(picks(logits, batch)[row] in likeliest[row] for row in (1, 3))


@pytest.mark.parametrize("request_", [GREEDY, DRAWN, FILTERED], ids=["greedy", "drawn", "filtered"])
def test_rows_that_are_not_numbers_have_picks(request_: tuple[float, int, float, float]) -> None:
    """The first NaN, else the first +inf, else of nothing but -inf the first token."""
    logits, batch = normal(5, 300), repeated([request_], 5)
    logits[0, [40, 200]], logits[0, 10] = torch.nan, torch.inf
    logits[1, [250, 290]] = torch.inf
    logits[2] = -torch.inf
    logits[3] = torch.nan
    logits[4, :299], logits[4, 299] = -torch.inf, -5.0
    assert picks(logits, batch, launch=small_launch()) == [40, 250, 0, 0, 299]


def test_a_whole_vocabulary() -> None:
    logits, batch = normal(2, VOCABULARY, scale=2), request_batch(DRAWN, (1.0, 40, 1.0, 0.0))
    launch = small_launch(chunk=8192, tile=4096)
    assert picks(logits, batch, NUM_TOKEN_IDS, launch) == reference_picks(logits, batch, NUM_TOKEN_IDS)


def _launches(num_rows: int, num_columns: int) -> list[KernelLaunch]:
    def column(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(num_rows, dtype=dtype, device="meta")

    short, long = torch.float32, torch.int64
    batch = SamplingBatch(column(short), column(long), column(short), column(short), column(long))
    logits = torch.empty(num_rows, num_columns, device="meta")
    with recorded_launches() as launches:
        sample(logits, batch, num_columns, launch=sampling_launch(num_columns, 90))
    return launches


def test_two_launches_whatever_is_asked() -> None:
    assert [len(_launches(num_rows, VOCABULARY)) for num_rows in (1, 256)] == [2, 2]


def test_one_row_is_spread_over_the_gpu() -> None:
    chunks, _ = _launches(1, VOCABULARY)
    assert chunks.grid == (148, 1)


def test_no_rows_start_nothing() -> None:
    assert _launches(0, 100) == []
