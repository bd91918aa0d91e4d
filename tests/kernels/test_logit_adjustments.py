"""Each adjustment by its definition, one logit at a time."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels.logit_adjustments import (
    LogitAdjustments,
    LogitBias,
    Penalties,
    adjust_logits,
    pack_token_mask,
    unpack_token_mask,
)


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _penalties(repetition: float = 1.0, frequency: float = 0.0, presence: float = 0.0) -> Penalties:
    """Of two rows; the second has in its prompt token 0, and in its output token 2 twice and token 3 once."""
    first = torch.tensor([1.0, 0.0, 0.0])
    rows = torch.stack((first, torch.tensor([repetition, frequency, presence])), dim=1)
    return Penalties(*rows, _int32(0, 0, 3), _int32(0, 2, 3, 77), _int32(0, 2, 1, 99))


def _adjusted(row: list[float], adjustments: LogitAdjustments) -> list[float]:
    """The second of two equal rows; the first must stay as it is."""
    logits = torch.tensor([row, row])
    adjust_logits(logits, adjustments)
    assert logits[0].tolist() == row
    return logits[1].tolist()


def test_nothing_to_adjust() -> None:
    assert _adjusted([1.0, -2.0], LogitAdjustments()) == [1.0, -2.0]


def test_bias_is_added_to_its_tokens() -> None:
    bias = LogitBias(_int32(0, 0, 2), _int32(3, 0, 55), torch.tensor([-100.0, 2.5, 9.0]))
    assert _adjusted([1.0, 2.0, 3.0, 4.0], LogitAdjustments(bias=bias)) == [3.5, 2.0, 3.0, -96.0]


def test_repetition_divides_logits_above_zero_and_multiplies_others_of_prompt_and_output() -> None:
    adjustments = LogitAdjustments(penalties=_penalties(repetition=2.0))
    assert _adjusted([3.0, 3.0, -3.0, 0.0], adjustments) == [1.5, 3.0, -6.0, 0.0]


def test_frequency_counts_the_output() -> None:
    adjustments = LogitAdjustments(penalties=_penalties(frequency=0.5))
    assert _adjusted([1.0, 1.0, 1.0, 1.0], adjustments) == [1.0, 1.0, 0.0, 0.5]


def test_presence_asks_for_the_output() -> None:
    adjustments = LogitAdjustments(penalties=_penalties(presence=-0.5))
    assert _adjusted([1.0, 1.0, 1.0, 1.0], adjustments) == [1.0, 1.0, 1.5, 1.5]


def test_bias_comes_before_repetition_and_penalties_are_subtracted_after_it() -> None:
    bias = LogitBias(_int32(0, 0, 1), _int32(2), torch.tensor([4.0]))
    adjustments = LogitAdjustments(bias, _penalties(repetition=2.0, frequency=0.25, presence=1.0))
    assert _adjusted([0.0, 0.0, -2.0, 0.0], adjustments) == [0.0, 0.0, -0.5, -1.25]


def test_the_mask_forbids_whatever_the_bias() -> None:
    bias = LogitBias(_int32(0, 0, 1), _int32(1), torch.tensor([100.0]))
    allowed = pack_token_mask(torch.tensor([[True, True, True], [True, False, True]]))
    assert _adjusted([1.0, 2.0, 3.0], LogitAdjustments(bias, allowed=allowed)) == [1.0, -torch.inf, 3.0]


def test_impossible_tokens_stay_impossible() -> None:
    adjustments = LogitAdjustments(penalties=_penalties(2.0, 1.0, 1.0))
    assert _adjusted([-torch.inf] * 4, adjustments) == [-torch.inf] * 4


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 64, 1000])
def test_masks_are_packed_and_unpacked(num_tokens: int) -> None:
    is_allowed = torch.randn(3, num_tokens, generator=torch.Generator().manual_seed(num_tokens)) > 0
    is_allowed[0] = True
    words = pack_token_mask(is_allowed)
    assert words.dtype == torch.int32
    assert words.shape == (3, -(-num_tokens // 32))
    assert unpack_token_mask(words, num_tokens).equal(is_allowed)


def test_bits_are_counted_from_the_lowest() -> None:
    is_allowed = torch.zeros(1, 64, dtype=torch.bool)
    is_allowed[0, [0, 33, 63]] = True
    assert pack_token_mask(is_allowed).tolist() == [[1, 2 - 2**31]]
