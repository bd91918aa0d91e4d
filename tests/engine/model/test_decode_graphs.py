"""Decode steps in recorded batch sizes: padding must change nothing and write nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nybble.engine.messages import SamplingParams
from nybble.engine.model.decode_graphs import DecodeGraphs, Recorder, Run, powers_of_two
from nybble.engine.scheduling.step import Chunk, StepInput, StepPlan, build_step_input

BLOCK_SIZE, MAX_BLOCKS, CPU = 4, 6, torch.device("cpu")


class FakeModel:
    """Logits say what the step held; `steps` are what it was run on."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.slots: list[list[int]] = []
        self.contexts: list[list[int]] = []

    def forward(self, step: StepInput) -> tuple[Tensor, Tensor]:
        attention = step.attention
        assert list(attention.query_lengths) == attention.query_starts.diff().tolist()
        self.sizes.append(len(step.token_ids))
        self.slots.append(attention.slots.tolist())
        self.contexts.append(attention.context_lengths.tolist())
        lengths = attention.query_starts.diff()
        contexts = (attention.context_lengths, attention.block_tables.sum(1))
        rows = (step.token_ids, step.positions, *(column.repeat_interleave(lengths) for column in contexts))
        return torch.stack(rows, dim=1)[step.logit_rows], step.token_ids.unsqueeze(1) * 10


def run_again(run: Run) -> Run:
    """`Record` without a GPU: what a graph launches is launched again, on the same addresses."""
    run()
    return run


def chunk(token_id: int, start: int, blocks: Sequence[int], is_sampled: bool = True) -> Chunk:
    return Chunk("r", [token_id], start, blocks, SamplingParams(max_tokens=1) if is_sampled else None)


def step_of(*chunks: Chunk) -> StepInput:
    return build_step_input(StepPlan(chunks), BLOCK_SIZE)


def graphs_of(model: FakeModel, max_num_seqs: int, query_lengths: Sequence[int] = (1,)) -> DecodeGraphs:
    recorder = Recorder(run_again, powers_of_two(max_num_seqs), at_start=True)
    return DecodeGraphs(model.forward, recorder, query_lengths, MAX_BLOCKS, CPU)


def late_graphs_of(
    model: FakeModel, sizes: Sequence[int], query_lengths: Sequence[int] = (1,)
) -> DecodeGraphs:
    """Recorded by the steps that need them."""
    recorder = Recorder(run_again, sizes, at_start=False)
    return DecodeGraphs(model.forward, recorder, query_lengths, MAX_BLOCKS, CPU)


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
    logits, hidden = graphs.run(step_of(*chunks))
    assert hidden.tolist() == [[70], [80], [90]]
    assert logits.tolist() == [[7, 5, 6, 12], [8, 0, 1, 2], [9, 20, 21, 31]]
    assert model.sizes[-1] == 4
    assert model.slots[-1] == [9 * 4 + 1, 2 * 4, 8 * 4, -1]


def test_nothing_is_left_of_a_larger_step() -> None:
    """What was padding, and what was not, changes from step to step."""
    model = FakeModel()
    graphs = graphs_of(model, 4)
    graphs.run(step_of(*(chunk(n, 7, [5, 6]) for n in range(4))))
    logits, _ = graphs.run(step_of(*(chunk(n, 3, [1]) for n in range(3))))
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


def drafted(token_ids: Sequence[int], start: int, blocks: Sequence[int], num_drafts: int) -> Chunk:
    return Chunk("r", token_ids, start, blocks, SamplingParams(max_tokens=1), num_drafts)


def test_there_is_a_recording_for_each_number_of_drafts() -> None:
    model = FakeModel()
    graphs_of(model, 4, range(1, 4))
    assert model.sizes == [12, 8, 6, 4, 4, 3, 2, 2, 1]


def test_drafts_are_padded_by_sequences() -> None:
    model = FakeModel()
    graphs = graphs_of(model, 4, (1, 2))
    chunks = [drafted([7, 1], 5, [3, 9], 1), drafted([8, 2], 0, [2], 1), drafted([9, 3], 3, [1, 4], 1)]
    logits, hidden = graphs.run(step_of(*chunks))
    contexts = [[7, 12], [7, 12], [2, 2], [2, 2], [5, 5], [5, 5]]
    tokens = [[7, 5], [1, 6], [8, 0], [2, 1], [9, 3], [3, 4]]
    assert logits.tolist() == [own + context for own, context in zip(tokens, contexts, strict=True)]
    assert hidden.flatten().tolist() == [70, 10, 80, 20, 90, 30]
    assert model.sizes[-1] == 8
    assert model.slots[-1] == [37, 38, 8, 9, 7, 16, -1, -1]
    assert model.contexts[-1] == [7, 2, 5, 0]


def test_which_drafts_can_run() -> None:
    graphs = graphs_of(FakeModel(), 2, (1, 2))
    one, two = drafted([1], 3, [0], 0), drafted([1, 2], 1, [0], 1)
    assert graphs.can_run(step_of(two)) and graphs.can_run(step_of(two, two))
    assert not graphs.can_run(step_of(two, one))
    assert not graphs.can_run(step_of(drafted([1, 2], 1, [0], 0)))
    assert not graphs.can_run(step_of(drafted([1, 2, 3], 1, [0], 2)))


def test_late_recordings_are_made_by_the_first_step_of_their_size() -> None:
    """With that step's numbers, so that nothing is padding."""
    model = FakeModel()
    graphs = late_graphs_of(model, range(1, 4), (1, 2))
    assert model.sizes == []
    chunks = [chunk(7, 5, [3, 9]), chunk(8, 0, [2]), chunk(9, 20, [1, 4, 5, 6, 7, 8])]
    expected = [[7, 5, 6, 12], [8, 0, 1, 2], [9, 20, 21, 31]]
    for _ in range(2):
        logits, _ = graphs.run(step_of(*chunks))
        assert logits.tolist() == expected
    assert set(model.sizes) == {3}
    assert [-1] not in model.slots and all(slot >= 0 for slots in model.slots for slot in slots)
    logits, _ = graphs.run(step_of(drafted([7, 1], 5, [3, 9], 1)))
    assert logits.tolist() == [[7, 5, 7, 12], [1, 6, 7, 12]]
    assert model.sizes[-1] == 2


def test_late_recordings_know_what_can_run() -> None:
    graphs = late_graphs_of(FakeModel(), range(1, 4))
    one = chunk(1, 3, [0])
    assert graphs.can_run(step_of(one, one, one))
    assert not graphs.can_run(step_of(one, one, one, one))
    assert not graphs.can_run(step_of(drafted([1, 2], 1, [0], 1)))
