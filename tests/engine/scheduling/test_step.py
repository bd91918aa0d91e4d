from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.engine.messages import SamplingParams
from nybble.engine.scheduling.step import Chunk, StepInput, StepPlan, build_step_input, pack, unpack

SAMPLING = SamplingParams(max_tokens=1)


def _chunk(
    token_ids: list[int], start: int, blocks: list[int], sampling: SamplingParams | None = SAMPLING
) -> Chunk:
    return Chunk("r", token_ids, start, blocks, sampling)


def _build(*chunks: Chunk, block_size: int = 4) -> StepInput:
    return build_step_input(StepPlan(chunks), block_size)


def test_a_plan_written_out() -> None:
    step = _build(
        _chunk([11, 12, 13, 14, 15], 0, [7, 2]),
        _chunk([21], 8, [3, 9, 1]),
        _chunk([31, 32, 33], 3, [5, 4], None),
    )
    assert step.token_ids.tolist() == [11, 12, 13, 14, 15, 21, 31, 32, 33]
    assert step.positions.tolist() == [0, 1, 2, 3, 4, 8, 3, 4, 5]
    assert step.attention.query_starts.tolist() == [0, 5, 6, 9]
    assert step.attention.context_lengths.tolist() == [5, 9, 6]
    assert step.attention.block_tables.tolist() == [[7, 2, 0], [3, 9, 1], [5, 4, 0]]
    assert step.attention.slots.tolist() == [28, 29, 30, 31, 8, 4, 23, 16, 17]
    assert step.logit_rows.tolist() == [4, 5]


def test_logits_of_drafts_and_of_the_token_before_them_are_wanted() -> None:
    step = _build(
        Chunk("a", [11, 12, 13], 4, [7, 2], SAMPLING, num_drafts=2),
        _chunk([21, 22], 0, [3], None),
        Chunk("b", [31, 32, 33], 0, [1], SAMPLING, num_drafts=0),
        Chunk("c", [41, 42, 43, 44], 0, [5], SAMPLING, num_drafts=1),
    )
    assert step.logit_rows.tolist() == [0, 1, 2, 7, 10, 11]


def test_a_plan_that_samples_nothing() -> None:
    step = _build(_chunk([1, 2], 0, [0], None))
    assert step.logit_rows.tolist() == []
    assert step.logit_rows.dtype == torch.int64


def test_dtypes_are_those_of_the_contract() -> None:
    step = _build(_chunk([1], 0, [0]))
    attention = step.attention
    wide = (step.token_ids, step.positions, step.logit_rows, attention.slots)
    narrow = (attention.query_starts, attention.context_lengths, attention.block_tables)
    assert {tensor.dtype for tensor in wide} == {torch.int64}
    assert {tensor.dtype for tensor in narrow} == {torch.int32}


def test_slots_of_a_large_cache_do_not_overflow() -> None:
    last = (1 << 31) // 16
    assert _build(_chunk([1], 17, [0, last]), block_size=16).attention.slots.tolist() == [(1 << 31) + 1]


def test_a_plan_counts_its_tokens_and_samples() -> None:
    plan = StepPlan((_chunk([1, 2], 0, [0], None), _chunk([3], 0, [1])))
    assert plan.num_tokens == 3
    assert plan.sampling_chunks == plan.chunks[1:]
    assert StepPlan(()).num_tokens == 0


@st.composite
def _chunks(draw: st.DrawFn, block_size: int) -> Chunk:
    start, count = draw(st.integers(0, 30)), draw(st.integers(1, 20))
    num_blocks = -(-(start + count) // block_size) + draw(st.integers(0, 2))
    blocks = draw(st.lists(st.integers(0, 99), min_size=num_blocks, max_size=num_blocks))
    token_ids = draw(st.lists(st.integers(0, 151_551), min_size=count, max_size=count))
    return _chunk(token_ids, start, blocks, draw(st.sampled_from([SAMPLING, None])))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([1, 4, 16]))
def test_flattened_token_by_token(data: st.DataObject, block_size: int) -> None:
    chunks = data.draw(st.lists(_chunks(block_size), min_size=1, max_size=5))
    step = _build(*chunks, block_size=block_size)
    row = 0
    logit_rows = []
    for number, chunk in enumerate(chunks):
        assert step.attention.query_starts[number] == row
        assert step.attention.context_lengths[number] == chunk.start + len(chunk.token_ids)
        table = step.attention.block_tables[number].tolist()
        assert table[: len(chunk.blocks)] == chunk.blocks
        assert not any(table[len(chunk.blocks) :])
        for position, token_id in enumerate(chunk.token_ids, start=chunk.start):
            block, offset = divmod(position, block_size)
            expected = (token_id, position, chunk.blocks[block] * block_size + offset)
            actual = (step.token_ids[row], step.positions[row], step.attention.slots[row])
            assert tuple(int(value) for value in actual) == expected
            row += 1
        logit_rows += [row - 1] * (chunk.sampling is not None)
    assert step.attention.query_starts[-1] == row == len(step.token_ids)
    assert step.logit_rows.tolist() == logit_rows
    assert step.attention.query_lengths == tuple(len(chunk.token_ids) for chunk in chunks)


@pytest.mark.parametrize("block_size", [1, 16])
def test_block_tables_are_as_wide_as_the_longest(block_size: int) -> None:
    step = _build(_chunk([1], 0, [4]), _chunk([1], 0, [5, 6, 7]), block_size=block_size)
    assert step.attention.block_tables.shape == (2, 3)


# The way to other ranks.


def _tensors(step: StepInput) -> dict[str, Tensor]:
    values = vars(step) | vars(step.attention)
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _assert_equal(actual: StepInput, expected: StepInput) -> None:
    wanted = _tensors(expected)
    assert len(wanted) == 7
    for name, tensor in _tensors(actual).items():
        assert tensor.dtype == wanted[name].dtype, name
        assert tensor.shape == wanted[name].shape, name
        assert torch.equal(tensor, wanted[name]), name
    assert actual.attention.query_lengths == expected.attention.query_lengths


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([1, 4, 16]))
def test_unpack_is_the_inverse_of_pack(data: st.DataObject, block_size: int) -> None:
    step = _build(*data.draw(st.lists(_chunks(block_size), min_size=1, max_size=5)), block_size=block_size)
    packed = pack(step)
    assert packed.dtype == torch.int64 and packed.ndim == 1
    _assert_equal(unpack(packed), step)


@pytest.mark.parametrize("sampling", [SAMPLING, None])
def test_large_numbers_survive_the_way(sampling: SamplingParams | None) -> None:
    step = _build(_chunk([151_551], 1 << 20, [(1 << 31) - 1] * ((1 << 16) + 1), sampling), block_size=16)
    assert int(step.attention.slots.max()) > 1 << 33
    _assert_equal(unpack(pack(step)), step)


def test_a_packed_step_of_another_size_is_an_error() -> None:
    packed = pack(_build(_chunk([1, 2], 0, [0])))
    for wrong in (packed[:-1], torch.cat((packed, packed[:1]))):
        with pytest.raises(RuntimeError, match="split_with_sizes"):
            unpack(wrong)


def test_a_step_moves_whole() -> None:
    step = _build(_chunk([1, 2], 0, [0]), _chunk([3], 4, [5, 6], None))
    _assert_equal(step.to(torch.device("cpu")), step)
    moved = step.to(torch.device("meta"))
    assert {tensor.device.type for tensor in _tensors(moved).values()} == {"meta"}
    assert {n: t.dtype for n, t in _tensors(moved).items()} == {n: t.dtype for n, t in _tensors(step).items()}
    assert {n: t.shape for n, t in _tensors(moved).items()} == {n: t.shape for n, t in _tensors(step).items()}
