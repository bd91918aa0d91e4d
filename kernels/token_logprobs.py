"""Log-probabilities of the tokens of a row: of its distribution before temperature and filters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Logprobs:
    """chosen: float32 [S]. Of the likeliest tokens, falling, of equal ones the lowest id first: top_ids int64
    [S, num_top] and top float32 [S, num_top]."""

    chosen: Tensor
    top_ids: Tensor
    top: Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, num_token_ids: int, num_top: int) -> Logprobs:
    """Of the tokens token_ids, int64 [S], and the num_top likeliest (all, if there are no more).

    Only the first num_token_ids columns of logits, float32 [S, V], are tokens. A row with NaN, with +inf or
    with nothing but -inf gets NaN.
    """
    logprobs = logits[:, :num_token_ids].log_softmax(dim=-1)
    top, top_ids = logprobs.sort(dim=-1, descending=True, stable=True)
    chosen = logprobs.gather(1, token_ids.unsqueeze(-1)).squeeze(-1)
    return Logprobs(chosen, top_ids[:, :num_top], top[:, :num_top])
