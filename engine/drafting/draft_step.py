"""What the draft layer runs after a step, as the flat tensors that every rank runs on.

A row of the draft layer needs the token that follows it. So when a step's tokens are sampled, its rows can be
run: all of them, over the same attention batch. Rows of drafts that were rejected are run too, with whatever
token; like their keys and values in the main model, they are written again before anything reads them. From
the last row that counts, each sequence then drafts on, one token after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nybble.engine.scheduling.step import Chunk, SampledToken, StepPlan


@dataclass(frozen=True)
class DraftInput:
    """Of a step with T tokens, S' of whose sequences are drafted for, those with more drafts first.

    next_token_ids: int64 [T]; the token after each of the step's.
    rows: int64 [S']; among the T, each sequence's last one that counts.
    chunks: int64 [S']; their place among the step's sequences.
    num_drafts: of each, at least 1.
    """

    next_token_ids: Tensor
    rows: Tensor
    chunks: Tensor
    num_drafts: tuple[int, ...]


@dataclass(frozen=True)
class DraftPlan:
    """`request_ids` are those of the sequences in `inputs`, in its order."""

    request_ids: tuple[str, ...]
    inputs: DraftInput


def plan_drafts(
    plan: StepPlan,
    sampled: Sequence[tuple[SampledToken, ...]],
    num_drafts: Mapping[str, int],
    block_size: int,
) -> DraftPlan:
    """From a plan, what it sampled, and how many drafts each request is to get, 0 if it is not named.

    A sequence gets fewer where its blocks end: the row of every draft but the first takes a slot.
    """
    next_ids = np.zeros(plan.num_tokens, dtype=np.int64)
    wanted: list[tuple[int, int, int]] = []  # negative number of drafts, row, chunk
    tokens, end = iter(sampled), 0
    for index, chunk in enumerate(plan.chunks):
        first, end = end, end + len(chunk.token_ids)
        next_ids[first : end - 1] = chunk.token_ids[1:]
        if chunk.sampling is None:
            next_ids[end - 1] = _following(chunk)
            continue
        own = next(tokens)
        row = end - 1 - chunk.num_drafts + len(own) - 1
        next_ids[row] = own[-1].token_id
        count = min(num_drafts.get(chunk.request_id, 0), _room(chunk, row - first, block_size))
        if count:
            wanted.append((-count, row, index))
    counts, rows, chunks = np.array(sorted(wanted), dtype=np.int64).reshape(-1, 3).T
    inputs = DraftInput(
        next_token_ids=torch.from_numpy(next_ids),
        rows=torch.from_numpy(rows.copy()),
        chunks=torch.from_numpy(chunks.copy()),
        num_drafts=tuple((-counts).tolist()),
    )
    return DraftPlan(tuple(plan.chunks[index].request_id for index in chunks.tolist()), inputs)


def pack(inputs: DraftInput) -> Tensor:
    """As int64 [N], for the way to other ranks."""
    sizes = torch.tensor([len(inputs.next_token_ids), len(inputs.rows)])
    counts = torch.tensor(inputs.num_drafts, dtype=torch.int64)
    return torch.cat((sizes, inputs.next_token_ids, inputs.rows, inputs.chunks, counts))


def unpack(numbers: Tensor) -> DraftInput:
    """The inverse of `pack`."""
    num_tokens, num_rows = numbers[:2].tolist()
    next_token_ids, rows, chunks, counts = torch.split(numbers[2:], [num_tokens] + [num_rows] * 3)
    return DraftInput(next_token_ids, rows, chunks, tuple(counts.tolist()))


def _following(chunk: Chunk) -> int:
    if chunk.next_token_id is None:
        raise ValueError(f"request {chunk.request_id}: the token after its chunk is not known")
    return chunk.next_token_id


def _room(chunk: Chunk, offset: int, block_size: int) -> int:
    """How many drafts there are slots for after the token at `offset` of the chunk."""
    return len(chunk.blocks) * block_size - (chunk.start + offset)
