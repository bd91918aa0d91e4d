"""From logits to tokens and log-probabilities, each row by its own request's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic

import torch
from torch import Tensor

from nybble.engine.grammar.mask_thread import MaskThread
from nybble.engine.messages import SamplingParams, TokenLogprobs
from nybble.engine.sampling.adjustment_batch import adjustments_of
from nybble.engine.sampling.sampling_columns import SamplingColumns
from nybble.engine.scheduling.step import Chunk, SampledToken
from nybble.kernels.ops import Ops, W
from nybble.kernels.token_logprobs import Logprobs


class Sampler(Generic[W]):
    """num_token_ids: ids from here on are padding of the vocabulary and never sampled."""

    def __init__(self, ops: Ops[W], num_token_ids: int) -> None:
        self._ops = ops
        self._num_token_ids = num_token_ids
        self._masks = MaskThread()
        self._columns = SamplingColumns()

    def sample(self, logits: Tensor, chunks: Sequence[Chunk]) -> Draw:
        """The tokens that follow each chunk: those of its drafts that are accepted, and the next token.

        Waits for nothing that the device has to do.

        logits: float32 [S, V], overwritten. A chunk has a row for the token after its last that is no draft,
        and one for each draft.

        A draft is accepted if it is what is drawn in its place. For drafts that are guessed without chance
        that is rejection sampling (Leviathan, Kalman, Matias: "Fast inference from transformers via
        speculative decoding", 2023): a draft stays with its probability, and what replaces it has the
        distribution of the others. Since a position's random bits are its own, the tokens are those that
        are drawn without drafts.
        """
        params = [_sampling_of(chunk) for chunk in chunks for _ in range(chunk.num_drafts + 1)]
        adjustments = adjustments_of(chunks, logits.device, self._masks)
        asked = _logprob_rows(logits, params, must_copy=adjustments is not None)
        if adjustments is not None:
            self._ops.adjust_logits(logits[:, : self._num_token_ids], adjustments)
        batch = self._columns.batch(chunks, params, logits.device)
        picks = self._ops.sample(logits, batch, self._num_token_ids)
        return Draw(chunks, picks, None if asked is None else self._logprobs(asked, picks))

    def score(self, logits: Tensor, chunks: Sequence[Chunk]) -> Scoring:
        """Log-probabilities of tokens of prompts; waits for nothing either.

        logits: float32 [S, V], a row for each position that a chunk scores.
        """
        following = [token_id for chunk in chunks for token_id in _following(chunk)]
        counts = [chunk.scores.num_top for chunk in chunks if chunk.scores for _ in chunk.scored]
        token_ids = torch.tensor(following, device=logits.device)
        found = self._ops.token_logprobs(logits, token_ids, self._num_token_ids, max(counts))
        return Scoring(chunks, _DrawnLogprobs(list(range(len(counts))), counts, found))

    def _logprobs(self, asked: _LogprobRows, picks: Tensor) -> _DrawnLogprobs:
        picks = picks if len(asked.rows) == len(picks) else picks[asked.rows]
        found = self._ops.token_logprobs(asked.logits, picks, self._num_token_ids, max(asked.counts))
        return _DrawnLogprobs(asked.rows, asked.counts, found)


@dataclass(frozen=True)
class Draw:
    """What was drawn for some chunks. picks: int64 [S], on a device that may be at work on it yet."""

    chunks: Sequence[Chunk]
    picks: Tensor
    logprobs: _DrawnLogprobs | None = None

    def tokens(self) -> list[tuple[SampledToken, ...]]:
        """Of each chunk, once the device has them."""
        logprobs = {} if self.logprobs is None else self.logprobs.by_row()
        picks = self.picks.tolist()
        tokens = [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(picks)]
        return list(_accepted(self.chunks, tokens))


@dataclass(frozen=True)
class Scoring:
    """What was found of the prompts of some chunks, on a device that may be at work on it yet."""

    chunks: Sequence[Chunk]
    logprobs: _DrawnLogprobs

    def settle(self) -> None:
        """Give each chunk's to its `scores`, once the device has them."""
        found = iter(self.logprobs.by_row().values())
        for chunk in self.chunks:
            if chunk.scores is not None:
                chunk.scores.add(list(islice(found, len(chunk.scored))))


@dataclass(frozen=True)
class _DrawnLogprobs:
    """Of some rows, how many of the likeliest tokens each wants, and what was found."""

    rows: list[int]
    counts: list[int]
    found: Logprobs

    def by_row(self) -> dict[int, TokenLogprobs]:
        columns = (self.found.chosen.tolist(), self.found.top_ids.tolist(), self.found.top.tolist())
        return {
            row: TokenLogprobs(logprob=own, top=tuple(zip(ids[:count], top[:count], strict=True)))
            for row, count, own, ids, top in zip(self.rows, self.counts, *columns, strict=True)
        }


@dataclass(frozen=True)
class _LogprobRows:
    """Rows that want logprobs, how many of the likeliest tokens each, and their logits as the model gave
    them."""

    rows: list[int]
    counts: list[int]
    logits: Tensor


def _following(chunk: Chunk) -> Sequence[int]:
    return () if chunk.scores is None else chunk.scores.following(chunk.scored)


def _sampling_of(chunk: Chunk) -> SamplingParams:
    if chunk.sampling is None:
        raise ValueError(f"request {chunk.request_id}: its chunk has nothing to sample")
    return chunk.sampling


def _logprob_rows(logits: Tensor, params: Sequence[SamplingParams], must_copy: bool) -> _LogprobRows | None:
    asked = {row: p.num_logprobs for row, p in enumerate(params) if p.num_logprobs is not None}
    if not asked:
        return None
    rows = list(asked)
    if len(rows) < len(params):
        logits = logits[rows]
    elif must_copy:
        logits = logits.clone()
    return _LogprobRows(rows, list(asked.values()), logits)


def _accepted(chunks: Sequence[Chunk], tokens: Sequence[SampledToken]) -> Iterator[tuple[SampledToken, ...]]:
    """Each chunk's tokens up to the first that is not its draft."""
    rest = iter(tokens)
    for chunk in chunks:
        own = tuple(islice(rest, chunk.num_drafts + 1))
        drafts = chunk.token_ids[len(chunk.token_ids) - chunk.num_drafts :]
        yield own[: _num_equal(drafts, own) + 1]


def _num_equal(drafts: Sequence[int], tokens: Sequence[SampledToken]) -> int:
    """How many drafts are the tokens drawn in their places, before the first that is not."""
    for count, draft in enumerate(drafts):
        if tokens[count].token_id != draft:
            return count
    return len(drafts)
