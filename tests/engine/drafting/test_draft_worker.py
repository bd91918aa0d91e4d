"""Drafting from draft to draft, over a layer that is not there.

`test_drafter` has a real one, `test_worker` on several ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from nybble.engine.drafting.draft_step import DraftInput
from nybble.engine.drafting.draft_worker import DraftWorker
from nybble.engine.messages import SamplingParams
from nybble.engine.planning.placement import Placement, Split
from nybble.engine.ranks.rank_group import RankGroup
from nybble.engine.scheduling.step import Chunk, StepPlan, build_step_input
from nybble.kernels.ops import AttentionBatch, KVCacheLayer

BLOCK_SIZE, VOCABULARY = 4, 16
CACHE = KVCacheLayer(torch.empty(0), torch.empty(0))


@dataclass
class NextNumber:
    """Guesses the token after the next to be larger by the hidden state, which grows by 1 from row to row."""

    positions: list[list[int]] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    contexts: list[list[int]] = field(default_factory=list)

    def forward(
        self, next_ids: Tensor, hidden: Tensor, positions: Tensor, cache: KVCacheLayer, batch: AttentionBatch
    ) -> tuple[Tensor, Tensor]:
        self.positions.append(positions.tolist())
        self.slots.append(batch.slots.tolist())
        self.contexts.append(batch.context_lengths.tolist())
        return next_ids.unsqueeze(1) + hidden, hidden + 1

    def logits(self, output: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(output[:, 0].long() % VOCABULARY, VOCABULARY).float()


@dataclass
class OtherRanks:
    """A group whose other ranks have the best tokens that they are told to have."""

    placement: Placement = field(default_factory=Placement)
    others: tuple[tuple[float, int], ...] = ()

    def gather_stage(self, share: Tensor) -> tuple[Tensor, ...]:
        others = [torch.tensor(pair, dtype=share.dtype).unsqueeze(1).expand_as(share) for pair in self.others]
        return (share, *others)


def worker_of(model: object, group: OtherRanks, num_token_ids: int = VOCABULARY) -> DraftWorker[Any]:
    return DraftWorker(cast(Any, model), CACHE, cast(RankGroup, group), BLOCK_SIZE, num_token_ids)


def test_each_draft_comes_from_the_one_before() -> None:
    model = NextNumber()
    sampling = SamplingParams(max_tokens=9)
    chunks = (
        Chunk("a", [1, 2, 3], 0, [5, 6], sampling),
        Chunk("b", [4, 0], 6, [2, 3, 9], sampling, num_drafts=1),
    )
    step = build_step_input(StepPlan(chunks), BLOCK_SIZE)
    # Of "b" the draft is rejected: it goes on after token 4, at position 6.
    inputs = DraftInput(torch.tensor([2, 3, 7, 5, 0]), torch.tensor([3, 2]), torch.tensor([1, 0]), (3, 2))
    drafts = worker_of(model, OtherRanks()).draft(inputs, step, torch.ones(5, 1))
    assert drafts.tolist() == [[6, 8, 11], [8, 10, 0]]
    assert model.positions == [[0, 1, 2, 6, 7], [7, 3], [8]]
    assert model.slots[1:] == [[3 * 4 + 3, 5 * 4 + 3], [9 * 4]]
    assert model.contexts[1:] == [[8, 4], [9]]


def test_without_anybody_to_draft_for_only_rows_are_run() -> None:
    model = NextNumber()
    step = build_step_input(StepPlan((Chunk("a", [1, 2], 0, [5], None),)), BLOCK_SIZE)
    none = torch.empty(0, dtype=torch.int64)
    drafts = worker_of(model, OtherRanks()).draft(
        DraftInput(step.token_ids, none, none, ()), step, torch.ones(2, 1)
    )
    assert drafts.shape == (0, 0) and model.positions == [[0, 1]]


class Scores:
    def __init__(self, scores: list[float]) -> None:
        self._scores = scores

    def forward(self, next_ids: Tensor, hidden: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return hidden, hidden

    def logits(self, output: Tensor) -> Tensor:
        return torch.tensor([self._scores])


@pytest.mark.parametrize(
    ("scores", "others", "expected"),
    [
        ([0.0, 2.0, 1.0], (), 1),
        ([0.0, 2.0, 2.0], (), 1),
        ([0.0, 2.0, 9.0], (), 1),  # an id that the tokenizer does not have
        ([0.0, 2.0, 1.0], ((3.0, 4),), 4),
        ([0.0, 2.0, 1.0], ((2.0, 4),), 1),
        ([0.0, 2.0, 1.0], ((1.0, 4), (2.5, 7)), 7),
    ],
)
def test_the_likeliest_token_of_all_ranks(
    scores: list[float], others: tuple[tuple[float, int], ...], expected: int
) -> None:
    group = OtherRanks(Placement(Split(1 + len(others))), others)
    num_token_ids = 2 if 9.0 in scores else 3 * (1 + len(others))
    step = build_step_input(StepPlan((Chunk("a", [1], 0, [0], SamplingParams(max_tokens=1)),)), BLOCK_SIZE)
    zero = torch.zeros(1, dtype=torch.int64)
    inputs = DraftInput(zero, zero, zero, (1,))
    worker = worker_of(Scores(scores), group, num_token_ids)
    assert worker.draft(inputs, step, torch.ones(1, 1)).tolist() == [[expected]]


def test_a_later_rank_counts_from_its_first_id() -> None:
    group = OtherRanks(Placement(Split(2), rank=1), ((-5.0, 0),))
    step = build_step_input(StepPlan((Chunk("a", [1], 0, [0], SamplingParams(max_tokens=1)),)), BLOCK_SIZE)
    zero = torch.zeros(1, dtype=torch.int64)
    worker = worker_of(Scores([0.0, 2.0, 1.0]), group, 6)
    assert worker.draft(DraftInput(zero, zero, zero, (1,)), step, torch.ones(1, 1)).tolist() == [[4]]
