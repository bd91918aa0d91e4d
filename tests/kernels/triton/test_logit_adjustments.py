"""All adjustments against the reference, at odd sizes, with lists longer than what they hold."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels import logit_adjustments as reference
from nybble.kernels.logit_adjustments import LogitAdjustments, LogitBias, Penalties, pack_token_mask
from nybble.kernels.triton.launch import recorded_launches
from nybble.kernels.triton.logit_adjustments import AdjustmentLaunch, adjust_logits, adjustment_launch

SMALL = AdjustmentLaunch(tokens=16, tokens_warps=1, words=2, words_warps=1)


def _random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _lists(lengths: list[int], num_columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Row starts and tokens, each row's distinct; the list goes on with rubbish."""
    tokens = [torch.randperm(num_columns, generator=_random(seed + row))[:n] for row, n in enumerate(lengths)]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return starts.int().to(DEVICE), torch.cat([*tokens, torch.full((9,), 2**30)]).int().to(DEVICE)


def _bias(lengths: list[int], num_columns: int) -> LogitBias:
    starts, tokens = _lists(lengths, num_columns, seed=1)
    return LogitBias(starts, tokens, torch.randn(len(tokens), generator=_random()).to(DEVICE))


def _penalties(lengths: list[int], num_columns: int) -> Penalties:
    starts, tokens = _lists(lengths, num_columns, seed=2)
    counts = torch.randint(0, 4, tokens.shape, generator=_random(), dtype=torch.int32)
    settings = torch.rand(3, len(lengths), generator=_random(3)) + torch.tensor([[0.5], [-0.5], [-0.5]])
    return Penalties(*settings.to(DEVICE), starts, tokens, counts.to(DEVICE))


def _mask(num_rows: int, num_columns: int) -> Tensor:
    is_allowed = torch.rand(num_rows, num_columns, generator=_random(4)) < 0.7
    is_allowed[0] = True
    return pack_token_mask(is_allowed).to(DEVICE)


def _adjusted(logits: Tensor, adjustments: LogitAdjustments, launch: AdjustmentLaunch = SMALL) -> Tensor:
    logits = logits.clone()
    adjust_logits(logits, adjustments, launch=launch)
    return logits


def _expected(logits: Tensor, adjustments: LogitAdjustments) -> Tensor:
    logits = logits.clone()
    reference.adjust_logits(logits, adjustments)
    return logits


LENGTHS = [0, 1, 15, 16, 17, 40]
KINDS = ["bias", "penalties", "allowed", "bias penalties", "bias penalties allowed"]


@pytest.mark.parametrize("num_columns", [50, 64, 333])
@pytest.mark.parametrize("kinds", KINDS)
def test_adjustments_are_those_of_the_reference(kinds: str, num_columns: int) -> None:
    logits = torch.randn(6, num_columns, generator=_random(5)).to(DEVICE)
    logits[:, ::7] = -torch.inf
    adjustments = LogitAdjustments(
        bias=_bias(LENGTHS, num_columns) if "bias" in kinds else None,
        penalties=_penalties(LENGTHS[::-1], num_columns) if "penalties" in kinds else None,
        allowed=_mask(6, num_columns) if "allowed" in kinds else None,
    )
    expected = _expected(logits, adjustments)
    assert not expected.equal(logits)
    torch.testing.assert_close(_adjusted(logits, adjustments), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHES)
def test_shipped_launches(arch: int) -> None:
    logits = torch.randn(2, 5000, generator=_random(6)).to(DEVICE)
    adjustments = LogitAdjustments(_bias([3, 0], 5000), _penalties([1030, 7], 5000), _mask(2, 5000))
    actual = _adjusted(logits, adjustments, adjustment_launch(5000, arch))
    torch.testing.assert_close(actual, _expected(logits, adjustments), rtol=1e-6, atol=1e-6)


def test_rows_may_be_apart_and_what_is_between_stays() -> None:
    wide = torch.randn(6, 200, generator=_random(7)).to(DEVICE)
    adjustments = LogitAdjustments(_bias(LENGTHS, 100), _penalties(LENGTHS, 100), _mask(6, 100))
    expected = wide.clone()
    expected[:, 30:130] = _expected(wide[:, 30:130], adjustments)
    adjust_logits(wide[:, 30:130], adjustments, launch=SMALL)
    torch.testing.assert_close(wide, expected, rtol=1e-6, atol=1e-6)


def test_two_runs_agree() -> None:
    logits = torch.randn(6, 300, generator=_random(8)).to(DEVICE)
    adjustments = LogitAdjustments(_bias(LENGTHS, 300), _penalties(LENGTHS, 300), _mask(6, 300))
    assert _adjusted(logits, adjustments).equal(_adjusted(logits, adjustments))


def test_at_most_two_launches_and_none_without_adjustments() -> None:
    logits = torch.zeros(6, 100, device=DEVICE)
    everything = LogitAdjustments(_bias(LENGTHS, 100), _penalties(LENGTHS, 100), _mask(6, 100))
    only_mask = LogitAdjustments(allowed=_mask(6, 100))
    for adjustments, count in [(everything, 2), (only_mask, 1), (LogitAdjustments(), 0)]:
        with recorded_launches() as launches:
            adjust_logits(logits, adjustments, launch=SMALL)
        assert len(launches) == count
