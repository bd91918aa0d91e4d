"""Decode steps in recorded batch sizes: padding must change nothing and write nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nybble.engine.decode_graphs import DecodeGraphs, Run
from nybble.engine.messages import SamplingParams
from nybble.engine.step import Chunk, StepInput, StepPlan, build_step_input

BLOCK_SIZE, MAX_BLOCKS, CPU = 4, 6, torch.device("cpu")


class FakeModel:
    """Logits say what the step held; `steps` are what it was run on."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.slots: list[list[int]] = []
        self.contexts: list[list[int]] = []

    def forward(self, step: StepInput) -> Tensor:
        attention = step.attention
        assert attention.query_lengths == (1,) * len(step.token_ids)
        self.sizes.append(len(step.token_ids))
        self.slots.append(attention.slots.tolist())
        self.contexts.append(attention.context_lengths.tolist())
        rows = (step.token_ids, step.positions, attention.context_lengths, attention.block_tables.sum(1))
        return torch.stack(rows, dim=1)[step.logit_rows]


def run_again(run: Run) -> Run:
    """`Record` without a GPU: what a graph launches is launched again, on the same addresses."""
    run()
    return run


def chunk(token_id: int, start: int, blocks: Sequence[int], is_sampled: bool = True) -> Chunk:
    return Chunk("r", [token_id], start, blocks, SamplingParams(max_tokens=1) if is_sampled else None)


def step_of(*chunks: Chunk) -> StepInput:
    return build_step_input(StepPlan(chunks), BLOCK_SIZE)


def graphs_of(model: FakeModel, max_num_seqs: int) -> DecodeGraphs:
    return DecodeGraphs(model.forward, run_again, max_num_seqs, MAX_BLOCKS, CPU)


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [2, 1]), (3, [4, 2, 1]), (64, [64, 32, 16, 8, 4, 2, 1])]
)
def test_sizes_are_powers_of_two_the_largest_first(most: int, sizes: list[int]) -> None:
    model = FakeModel()
    graphs_of(model, most)
    assert model.sizes == sizes
    assert all(slot == -1 for slots in model.slots for slot in slots)


def test_a_step_is_padded_and_its_own_rows_come_back() -> None:
    model = FakeModel()
    graphs = graphs_of(model, 4)
    chunks = [chunk(7, 5, [3, 9]), chunk(8, 0, [2]), chunk(9, 20, [1, 4, 5, 6, 7, 8])]
    logits = graphs.run(step_of(*chunks))
    assert logits.tolist() == [[7, 5, 6, 12], [8, 0, 1, 2], [9, 20, 21, 31]]
    assert model.sizes[-1] == 4
    assert model.slots[-1] == [9 * 4 + 1, 2 * 4, 8 * 4, -1]


def test_nothing_is_left_of_a_larger_step() -> None:
    """What was padding, and what was not, changes from step to step."""
    model = FakeModel()
    graphs = graphs_of(model, 4)
    graphs.run(step_of(*(chunk(n, 7, [5, 6]) for n in range(4))))
    logits = graphs.run(step_of(*(chunk(n, 3, [1]) for n in range(3))))
    assert logits[:, :3].tolist() == [[n, 3, 4] for n in range(3)]
    assert model.slots[-1] == [7, 7, 7, -1]
    assert model.contexts[-1] == [4, 4, 4, 0]


def test_what_can_run() -> None:
    graphs = graphs_of(FakeModel(), 2)
    one = chunk(1, 3, [0])
    assert graphs.can_run(step_of(one)) and graphs.can_run(step_of(one, one))
    assert not graphs.can_run(step_of(one, one, one))
    assert not graphs.can_run(step_of(one, chunk(1, 3, [0], is_sampled=False)))
    two = Chunk("r", [1, 2], 0, [0], SamplingParams(max_tokens=1))
    assert not graphs.can_run(step_of(two))
    assert not graphs.can_run(step_of(one, two))
