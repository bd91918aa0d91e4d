"""The rules of a step's rows as the arrays that `Ops.adjust_logits` takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from msgspec import Struct
from torch import Tensor

from nybble.engine.grammar.mask_thread import MaskThread
from nybble.engine.sampling.logit_rules import ListedBias, LogitRules
from nybble.engine.sampling.token_counts import TokenCounts
from nybble.engine.scheduling.step import Chunk
from nybble.kernels.logit_adjustments import LogitAdjustments, LogitBias, Penalties


class _Row(Struct, frozen=True, gc=False):
    """A row that has rules: its number in the step, and the drafts that are assumed before it."""

    number: int
    rules: LogitRules
    drafts: Sequence[int]


def adjustments_of(
    chunks: Sequence[Chunk], device: torch.device, masks: MaskThread | None = None
) -> LogitAdjustments | None:
    """Of the rows of chunks that sample, one for each draft and one more; None if no row has any.

    Rows without rules take no time of their own. masks: computes those of grammars within its limit.
    """
    rows = list(_rows_with_rules(chunks))
    if not rows:
        return None
    if masks is not None:
        grammars = [(row.rules.grammar, row.drafts) for row in rows]
        masks.compute([(grammar, drafts) for grammar, drafts in grammars if grammar is not None])
    num_rows = len(chunks) + sum([chunk.num_drafts for chunk in chunks])
    return LogitAdjustments(
        bias=_bias_of(rows, num_rows, device),
        penalties=_penalties_of(rows, num_rows, device),
        allowed=_allowed_of(rows, num_rows, device),
    )


def _rows_with_rules(chunks: Sequence[Chunk]) -> Iterator[_Row]:
    number = 0
    for chunk in chunks:
        if chunk.rules is not None:
            drafts = chunk.token_ids[len(chunk.token_ids) - chunk.num_drafts :]
            for count in range(chunk.num_drafts + 1):
                yield _Row(number + count, chunk.rules, drafts[:count])
        number += 1 + chunk.num_drafts


def _bias_of(rows: Sequence[_Row], num_rows: int, device: torch.device) -> LogitBias | None:
    listed: dict[int, ListedBias] = {}
    for row in rows:
        bias = row.rules.bias(row.drafts)
        if bias is not None:
            listed[row.number] = bias
    if not listed:
        return None
    return LogitBias(
        row_starts=_row_starts({number: len(bias.ids) for number, bias in listed.items()}, num_rows, device),
        token_ids=_joined([bias.ids for bias in listed.values()], device),
        values=_joined([bias.values for bias in listed.values()], device),
    )


def _penalties_of(rows: Sequence[_Row], num_rows: int, device: torch.device) -> Penalties | None:
    counted = [(row, row.rules.counts) for row in rows if row.rules.counts is not None]
    if not counted:
        return None
    settings = np.repeat(np.array([[1.0], [0.0], [0.0]], dtype=np.float32), num_rows, axis=1)
    settings[:, [row.number for row, _ in counted]] = np.array([row.rules.penalties for row, _ in counted]).T
    repetition, frequency, presence = torch.from_numpy(settings).to(device)
    ids, counts = zip(*(_listed_counts(own, row.drafts) for row, own in counted), strict=True)
    lengths = {row.number: len(own) for (row, _), own in zip(counted, ids, strict=True)}
    return Penalties(
        repetition=repetition,
        frequency=frequency,
        presence=presence,
        row_starts=_row_starts(lengths, num_rows, device),
        token_ids=_joined(ids, device),
        output_counts=_joined(counts, device),
    )


def _listed_counts(counts: TokenCounts, drafts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return counts.followed_by(drafts) if drafts else (counts.ids, counts.counts)


def _allowed_of(rows: Sequence[_Row], num_rows: int, device: torch.device) -> Tensor | None:
    found = {row.number: row.rules.allowed_words(row.drafts) for row in rows}
    masks = {number: mask for number, mask in found.items() if mask is not None}
    if not masks:
        return None
    words = np.full((num_rows, len(next(iter(masks.values())))), -1, dtype=np.int32)
    for number, mask in masks.items():
        words[number] = mask
    return torch.from_numpy(words).to(device)


def _row_starts(lengths: dict[int, int], num_rows: int, device: torch.device) -> Tensor:
    """int32 [num_rows + 1]; lengths: of the rows that list any."""
    starts = np.zeros(num_rows + 1, dtype=np.int32)
    starts[np.array(list(lengths)) + 1] = list(lengths.values())
    return torch.from_numpy(starts.cumsum(dtype=np.int32)).to(device)


def _joined(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(device)
