"""The rules of a step's rows as the arrays that `Ops.adjust_logits` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nybble.engine.logit_rules import LogitRules
from nybble.engine.step import Chunk
from nybble.kernels.logit_adjustments import LogitAdjustments, LogitBias, Penalties


@dataclass(frozen=True)
class _Row:
    rules: LogitRules | None
    drafts: Sequence[int]


def adjustments_of(chunks: Sequence[Chunk], device: torch.device) -> LogitAdjustments | None:
    """Of the rows of chunks that sample, one for each draft and one more; None if no row has any."""
    if all(chunk.rules is None for chunk in chunks):
        return None
    rows = [_Row(chunk.rules, drafts) for chunk in chunks for drafts in _assumed_drafts(chunk)]
    return LogitAdjustments(
        bias=_bias_of(rows, device), penalties=_penalties_of(rows, device), allowed=_allowed_of(rows, device)
    )


def _assumed_drafts(chunk: Chunk) -> list[Sequence[int]]:
    """The drafts before each of the chunk's rows."""
    drafts = chunk.token_ids[len(chunk.token_ids) - chunk.num_drafts :]
    return [drafts[:count] for count in range(chunk.num_drafts + 1)]


def _bias_of(rows: Sequence[_Row], device: torch.device) -> LogitBias | None:
    biases = [row.rules.bias(row.drafts) if row.rules is not None else None for row in rows]
    listed = [bias for bias in biases if bias is not None]
    if not listed:
        return None
    return LogitBias(
        row_starts=_row_starts([0 if bias is None else len(bias.ids) for bias in biases], device),
        token_ids=_joined([bias.ids for bias in listed], device),
        values=_joined([bias.values for bias in listed], device),
    )


def _penalties_of(rows: Sequence[_Row], device: torch.device) -> Penalties | None:
    if all(row.rules is None or row.rules.counts is None for row in rows):
        return None
    off = (1.0, 0.0, 0.0)
    settings = np.array([off if row.rules is None else row.rules.penalties for row in rows], dtype=np.float32)
    listed = [_counted(row) for row in rows]
    repetition, frequency, presence = torch.from_numpy(settings.T.copy()).to(device)
    return Penalties(
        repetition=repetition,
        frequency=frequency,
        presence=presence,
        row_starts=_row_starts([len(ids) for ids, _ in listed], device),
        token_ids=_joined([ids for ids, _ in listed], device),
        output_counts=_joined([counts for _, counts in listed], device),
    )


_NOTHING = np.zeros(0, dtype=np.int32)


def _counted(row: _Row) -> tuple[np.ndarray, np.ndarray]:
    counts = None if row.rules is None else row.rules.counts
    if counts is None:
        return _NOTHING, _NOTHING
    return counts.followed_by(row.drafts) if row.drafts else (counts.ids, counts.counts)


def _allowed_of(rows: Sequence[_Row], device: torch.device) -> Tensor | None:
    words = [None if row.rules is None else row.rules.allowed_words for row in rows]
    masks = [mask for mask in words if mask is not None]
    if not masks:
        return None
    everything = np.full_like(masks[0], -1)
    return torch.from_numpy(np.stack([everything if mask is None else mask for mask in words])).to(device)


def _row_starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(device)


def _joined(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(device)
