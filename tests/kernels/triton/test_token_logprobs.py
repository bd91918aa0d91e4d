"""Log-probabilities against the reference in float64, ids exactly."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels import token_logprobs as reference
from nybble.kernels.token_logprobs import Logprobs
from nybble.kernels.triton.launch import recorded_launches
from nybble.kernels.triton.token_logprobs import LogprobsLaunch, logprobs_launch, token_logprobs

SMALL = LogprobsLaunch(chunk=64, chunk_warps=1, merge_warps=1)
TOLERANCE = {"max_error": 2e-6, "rms_error": 5e-7}


def _normal(*shape: int, scale: float = 3.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(DEVICE)


def _tokens(num_rows: int, num_token_ids: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randint(num_token_ids, (num_rows,), generator=generator).to(DEVICE)


def _assert_as_reference(
    logits: Tensor, num_token_ids: int, num_top: int, launch: LogprobsLaunch = SMALL
) -> Logprobs:
    tokens = _tokens(len(logits), num_token_ids)
    found = token_logprobs(logits, tokens, num_token_ids, num_top, launch=launch)
    expected = reference.token_logprobs(logits.double(), tokens, num_token_ids, num_top)
    assert found.top_ids.equal(expected.top_ids)
    for actual, wanted in ((found.chosen, expected.chosen), (found.top, expected.top)):
        assert actual.dtype == torch.float32
        finite = wanted.isfinite()
        assert actual.isfinite().equal(finite)
        assert_close(actual[finite], wanted[finite], **TOLERANCE)
    return found


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
@pytest.mark.parametrize(("num_columns", "num_token_ids"), [(1, 1), (64, 64), (65, 64), (300, 291)])
def test_logprobs_are_those_of_the_reference(num_columns: int, num_token_ids: int, num_top: int) -> None:
    logits = _normal(4, num_columns)
    logits[:, num_token_ids:] = torch.nan
    _assert_as_reference(logits, num_token_ids, num_top)


@pytest.mark.parametrize("arch", ARCHES)
def test_shipped_launches(arch: int) -> None:
    _assert_as_reference(_normal(2, 5000), 4990, 5, logprobs_launch(5000, arch))


@pytest.mark.parametrize("shift", [-1e4, 0.0, 300.0])
def test_far_from_zero(shift: float) -> None:
    _assert_as_reference((_normal(3, 200) + shift).round(decimals=2), 200, 3)


def test_of_equal_logits_the_lowest_ids_come_first() -> None:
    found = _assert_as_reference(torch.zeros(2, 300, device=DEVICE), 300, 7)
    assert found.top_ids.tolist() == [list(range(7))] * 2


def test_impossible_tokens_come_last() -> None:
    """Whole chunks of them, and more asked for than there are others."""
    logits = torch.full((2, 300), -torch.inf, device=DEVICE)
    logits[0, 200], logits[1, [290, 3]] = 1.0, -5.0
    found = _assert_as_reference(logits, 300, 4)
    assert found.top_ids.tolist() == [[200, 0, 1, 2], [3, 290, 0, 1]]


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf])
def test_rows_that_are_no_distribution(rubbish: float) -> None:
    logits = _normal(3, 200)
    logits[0, 100], logits[1] = rubbish, -torch.inf
    found = token_logprobs(logits, _tokens(3, 200), 200, 2, launch=SMALL)
    assert found.top[:2].isnan().all()
    assert found.chosen[:2].isnan().all()
    assert found.top[2].isfinite().all()


def test_rows_may_be_apart() -> None:
    _assert_as_reference(_normal(4, 400)[:, 33:250], 217, 3)


def test_a_whole_vocabulary() -> None:
    _assert_as_reference(_normal(1, 151_552), 151_365, 3, LogprobsLaunch(16_384, 1, 1))


def test_two_runs_agree() -> None:
    logits, tokens = _normal(3, 300), _tokens(3, 300)
    first, second = (token_logprobs(logits, tokens, 300, 4, launch=SMALL) for _ in range(2))
    assert all(vars(first)[name].equal(vars(second)[name]) for name in vars(first))


def test_two_launches() -> None:
    logits, tokens = torch.empty(8, 151_552, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    with recorded_launches() as launches:
        token_logprobs(logits, tokens, 151_365, 20, launch=logprobs_launch(151_552, 90))
    assert len(launches) == 2
