"""One engine step: what to run, decided over integers, and the flat tensors that every rank runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from nybble.engine.messages import SamplingParams, TokenLogprobs
from nybble.engine.sampling.logit_rules import LogitRules
from nybble.engine.sampling.prompt_scores import PromptScores
from nybble.kernels.ops import AttentionBatch

# Structs, since a step makes hundreds of them: a frozen dataclass took 1.5 us to make, twenty times as long.


class Chunk(Struct, frozen=True, gc=False):
    """Consecutive tokens of one sequence to run in this step.

    start: position of the first token; blocks: the sequence's cache blocks, in order, as far as these tokens
    reach; sampling: how to choose the token that follows, or None while more of the prompt is to come;
    num_drafts: how many of the last tokens are guesses of what will be sampled, to be verified. Only
    a chunk that samples has any; rules: what the request changes of its logits; next_token_id: what follows
    the chunk, if it does not sample; scores: what is found of the log-probabilities of the prompt, if wanted.
    """

    request_id: str
    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int] | NDArray[np.int32]
    sampling: SamplingParams | None
    num_drafts: int = 0
    rules: LogitRules | None = None
    next_token_id: int | None = None
    scores: PromptScores | None = None

    @property
    def scored(self) -> range:
        """Positions whose logits tell the log-probability of the prompt's next token."""
        if self.scores is None:
            return range(0)
        return self.scores.positions(self.start, self.start + len(self.token_ids))


@dataclass(frozen=True)
class StepPlan:
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def has_scores(self) -> bool:
        return any(chunk.scores is not None for chunk in self.chunks)

    @property
    def sampling_chunks(self) -> tuple[Chunk, ...]:
        return tuple(chunk for chunk in self.chunks if chunk.sampling is not None)


class SampledToken(Struct, frozen=True, gc=False):
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class StepInput:
    """token_ids, positions: int64 [T]; logit_rows: int64 [S'], the tokens whose logits are needed.

    Of each chunk, in order, those are what it scores, and if it samples the last one that is no draft, and
    the drafts.
    """

    token_ids: Tensor
    positions: Tensor
    attention: AttentionBatch
    logit_rows: Tensor

    def to(self, device: torch.device) -> StepInput:
        if device.type == "cpu":
            return self
        attention = AttentionBatch(
            query_starts=self.attention.query_starts.to(device),
            context_lengths=self.attention.context_lengths.to(device),
            block_tables=self.attention.block_tables.to(device),
            slots=self.attention.slots.to(device),
            query_lengths=self.attention.query_lengths,
        )
        token_ids, positions = self.token_ids.to(device), self.positions.to(device)
        return StepInput(token_ids, positions, attention, self.logit_rows.to(device))


def build_step_input(plan: StepPlan, block_size: int) -> StepInput:
    """Flatten a plan, on the host: the chunks one after the other, in its order."""
    query_lengths = tuple([len(chunk.token_ids) for chunk in plan.chunks])
    lengths = np.array(query_lengths)
    starts = np.array([chunk.start for chunk in plan.chunks])
    ends = lengths.cumsum()
    num_tokens = int(ends[-1])
    # A token's position is its place in the step, moved by its chunk.
    positions = np.arange(num_tokens) + np.repeat(starts - ends + lengths, lengths)
    tables = _block_tables(plan)
    rows = np.repeat(np.arange(len(lengths)), lengths)  # sequence of each token
    blocks, offsets = np.divmod(positions, block_size)
    slots = tables[rows, blocks].astype(np.int64) * block_size + offsets
    token_ids = np.fromiter(chain.from_iterable([c.token_ids for c in plan.chunks]), np.int64, num_tokens)

    def tensor(values: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(values.astype(dtype, copy=False))

    return StepInput(
        token_ids=torch.from_numpy(token_ids),
        positions=tensor(positions, np.int64),
        attention=AttentionBatch(
            query_starts=tensor(np.concatenate(([0], ends)), np.int32),
            context_lengths=tensor(starts + lengths, np.int32),
            block_tables=tensor(tables, np.int32),
            slots=tensor(slots, np.int64),
            query_lengths=query_lengths,
        ),
        logit_rows=tensor(_logit_rows(plan, ends), np.int64),
    )


def logit_places(plan: StepPlan) -> tuple[list[int], list[int]]:
    """Which of a step's rows of logits score tokens of prompts, and which are sampled from."""
    scored, sampled, end = list[int](), list[int](), 0
    for chunk in plan.chunks:
        start, end = end, end + len(chunk.scored)
        scored += range(start, end)
        if chunk.sampling is not None:
            start, end = end, end + 1 + chunk.num_drafts
            sampled += range(start, end)
    return scored, sampled


def pack(step: StepInput) -> Tensor:
    """A step on the host as int64 [N], for the way to other ranks."""
    attention = step.attention
    num_sequences, max_blocks = attention.block_tables.shape
    sizes = torch.tensor([len(step.token_ids), num_sequences, max_blocks, len(step.logit_rows)])
    return torch.cat(
        (
            sizes,
            step.token_ids,
            step.positions,
            attention.slots,
            step.logit_rows,
            attention.query_starts.long(),
            attention.context_lengths.long(),
            attention.block_tables.flatten().long(),
        )
    )


def unpack(numbers: Tensor) -> StepInput:
    """The inverse of `pack`."""
    num_tokens, num_sequences, max_blocks, num_rows = numbers[:4].tolist()
    lengths = [num_tokens] * 3 + [num_rows, num_sequences + 1, num_sequences, num_sequences * max_blocks]
    token_ids, positions, slots, rows, starts, contexts, tables = torch.split(numbers[4:], lengths)
    attention = AttentionBatch(
        query_starts=starts.int(),
        context_lengths=contexts.int(),
        block_tables=tables.int().view(num_sequences, max_blocks),
        slots=slots,
        query_lengths=tuple(starts.diff().tolist()),
    )
    return StepInput(token_ids, positions, attention, rows)


def _logit_rows(plan: StepPlan, ends: np.ndarray) -> np.ndarray:
    """ends: of each chunk's tokens, among those of the step."""
    num_rows = np.array([0 if chunk.sampling is None else 1 + chunk.num_drafts for chunk in plan.chunks])
    sampled = _last_of_each(ends, num_rows)
    if not plan.has_scores:
        return sampled
    places = [
        np.array(chunk.scored, dtype=np.int64) - chunk.start - len(chunk.token_ids) + end
        for chunk, end in zip(plan.chunks, ends, strict=True)
    ]
    return np.sort(np.concatenate([*places, sampled]))


def _last_of_each(ends: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The last `counts[i]` numbers below each `ends[i]`, in order."""
    first = np.repeat(ends - counts.cumsum(), counts)
    return first + np.arange(len(first))


def _block_tables(plan: StepPlan) -> np.ndarray:
    """int32 [S, longest table], padded with 0."""
    tables = np.zeros((len(plan.chunks), max(len(c.blocks) for c in plan.chunks)), dtype=np.int32)
    for row, chunk in zip(tables, plan.chunks, strict=True):
        row[: len(chunk.blocks)] = chunk.blocks
    return tables
