"""What requests change of their logits before a token is sampled, in plain torch.

In this order, which is vLLM's; frequency, presence and bias are OpenAI's definitions:

    bias          logit + bias
    repetition    of a token in prompt or output: logit / r if it is above 0, else logit * r
    frequency     logit - f * the number of times the token is in the output
    presence      logit - p, if the token is in the output
    allowed       -inf for all tokens that are not

Tokens with bias or counts are listed row after row: row s has items row_starts[s] .. row_starts[s + 1], each
token at most once. Lists may be longer than what row_starts covers, so that they can keep their addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 32


@dataclass(frozen=True)
class LogitBias:
    """row_starts: int32 [S + 1]; token_ids: int32 [N]; values: float32 [N]."""

    row_starts: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class Penalties:
    """repetition, frequency, presence: float32 [S]; 1, 0 and 0 are off.

    row_starts: int32 [S + 1]; token_ids: int32 [N], the tokens of prompt and output; output_counts: int32
    [N], how often each is in the output, 0 if only in the prompt. A row without penalties may list none.
    """

    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    row_starts: Tensor
    token_ids: Tensor
    output_counts: Tensor


@dataclass(frozen=True)
class LogitAdjustments:
    """Of S rows of logits [S, V]; None where no row has any.

    allowed: int32 [S, ceil(V / 32)]; bit v % 32 of word v / 32, counted from the lowest, is 1 if v is allowed
    """

    bias: LogitBias | None = None
    penalties: Penalties | None = None
    allowed: Tensor | None = None


def adjust_logits(logits: Tensor, adjustments: LogitAdjustments) -> None:
    """Adjust logits, float32 [S, V], in place."""
    if adjustments.bias is not None:
        _add_bias(logits, adjustments.bias)
    if adjustments.penalties is not None:
        _penalize(logits, adjustments.penalties)
    if adjustments.allowed is not None:
        is_allowed = unpack_token_mask(adjustments.allowed, logits.shape[1])
        logits.masked_fill_(~is_allowed, -torch.inf)


def pack_token_mask(is_allowed: Tensor) -> Tensor:
    """bool [S, V] as int32 [S, ceil(V / 32)], the bits that are left over 0."""
    padding = -is_allowed.shape[-1] % _WORD
    bits = torch.unflatten(torch.nn.functional.pad(is_allowed, (0, padding)).long(), -1, (-1, _WORD))
    words = (bits << torch.arange(_WORD, device=bits.device)).sum(dim=-1)
    return words.to(torch.int32)  # the highest bit becomes the sign


def unpack_token_mask(words: Tensor, num_tokens: int) -> Tensor:
    """The inverse of `pack_token_mask`: bool [S, num_tokens]."""
    bits = words.unsqueeze(-1) >> torch.arange(_WORD, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(-2)[..., :num_tokens].bool()


def _add_bias(logits: Tensor, bias: LogitBias) -> None:
    rows = _rows(bias.row_starts)
    at = rows, bias.token_ids[: len(rows)].long()
    logits[at] += bias.values[: len(rows)]


def _penalize(logits: Tensor, penalties: Penalties) -> None:
    rows = _rows(penalties.row_starts)
    at, counts = (rows, penalties.token_ids[: len(rows)].long()), penalties.output_counts[: len(rows)]
    x, repetition = logits[at], penalties.repetition[rows]
    x = torch.where(x > 0, x / repetition, x * repetition)
    x = x - penalties.frequency[rows] * counts
    logits[at] = x - penalties.presence[rows] * (counts > 0)


def _rows(row_starts: Tensor) -> Tensor:
    """int64 [N]: the row of each listed item."""
    rows = torch.arange(len(row_starts) - 1, device=row_starts.device)
    return rows.repeat_interleave(row_starts.diff())
