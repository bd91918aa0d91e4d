"""Log-probabilities by their definition, in float64."""

from __future__ import annotations

import torch
from closeness import assert_close

from nybble.kernels.token_logprobs import token_logprobs


def test_logprobs_of_the_chosen_and_the_likeliest_tokens() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.4, 0.1]])
    found = token_logprobs(probabilities.log() + 3.0, torch.tensor([3, 1]), 4, num_top=3)
    assert found.top_ids.tolist() == [[1, 2, 3], [2, 0, 1]]
    assert_close(found.chosen.exp(), torch.tensor([0.2, 0.25]), max_error=1e-6, rms_error=1e-6)
    expected = torch.tensor([[0.4, 0.3, 0.2], [0.4, 0.25, 0.25]])
    assert_close(found.top.exp(), expected, max_error=1e-6, rms_error=1e-6)


def test_padding_is_no_part_of_the_distribution() -> None:
    logits = torch.tensor([[0.0, 0.0, 50.0]])
    found = token_logprobs(logits, torch.tensor([1]), 2, num_top=5)
    assert found.top_ids.tolist() == [[0, 1]]
    assert_close(found.chosen.exp(), torch.tensor([0.5]), max_error=1e-6, rms_error=1e-6)


def test_no_likeliest_tokens() -> None:
    found = token_logprobs(torch.zeros(3, 8), torch.tensor([1, 2, 3]), 8, num_top=0)
    assert found.top.shape == found.top_ids.shape == (3, 0)
