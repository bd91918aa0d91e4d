"""Which rows the draft layer runs after a step, and from which it drafts on."""

from __future__ import annotations

import pytest
import torch

from nybble.engine.drafting.draft_step import DraftInput, pack, plan_drafts, unpack
from nybble.engine.messages import SamplingParams
from nybble.engine.scheduling.step import Chunk, SampledToken, StepPlan

BLOCK_SIZE = 4
SAMPLING = SamplingParams(max_tokens=9)


def prompt(name: str, token_ids: list[int], start: int, next_token_id: int | None = None) -> Chunk:
    """Of a prompt that goes on, or whose next token is sampled."""
    sampling = SAMPLING if next_token_id is None else None
    return Chunk(name, token_ids, start, range(8), sampling, next_token_id=next_token_id)


def drafted(name: str, token_ids: list[int], start: int, num_blocks: int = 8) -> Chunk:
    return Chunk(name, token_ids, start, range(num_blocks), SAMPLING, num_drafts=len(token_ids) - 1)


def answers(*token_ids: tuple[int, ...]) -> list[tuple[SampledToken, ...]]:
    return [tuple(SampledToken(token_id, None) for token_id in own) for own in token_ids]


def test_the_token_after_each_is_known() -> None:
    """Within a chunk, after a part of a prompt, and where it was sampled; after rejected drafts, any."""
    plan = StepPlan(
        (
            prompt("a", [1, 2, 3], 4, next_token_id=4),
            prompt("b", [5, 6], 0),
            drafted("c", [10, 11, 12], 7),
            drafted("d", [20, 21, 22], 7),
            drafted("e", [30, 31], 7),
        )
    )
    drafts = plan_drafts(plan, answers((7,), (99,), (21, 98), (31, 32)), {}, BLOCK_SIZE)
    ids = drafts.inputs.next_token_ids.tolist()
    assert ids[:5] == [2, 3, 4, 6, 7]
    assert ids[5] == 99
    assert ids[8:10] == [21, 98]
    assert ids[11:] == [31, 32]
    assert drafts.request_ids == () and drafts.inputs.num_drafts == ()


def test_drafts_start_at_the_last_row_that_counts_the_most_drafts_first() -> None:
    plan = StepPlan(
        (
            prompt("a", [1, 2, 3], 4, next_token_id=4),
            drafted("b", [10, 11, 12], 7),
            prompt("c", [5, 6], 0),
            drafted("d", [20, 21, 22], 7),
            drafted("e", [30], 2),
        )
    )
    wanted = {"a": 3, "b": 1, "c": 4, "d": 2}
    drafts = plan_drafts(plan, answers((99,), (7,), (21, 22, 23), (1,)), wanted, BLOCK_SIZE)
    assert drafts.request_ids == ("c", "d", "b")
    assert drafts.inputs.num_drafts == (4, 2, 1)
    assert drafts.inputs.rows.tolist() == [7, 10, 3]
    assert drafts.inputs.chunks.tolist() == [2, 3, 1]


@pytest.mark.parametrize(("start", "expected"), [(4, 4), (5, 3), (6, 2), (7, 1)])
def test_drafts_end_where_blocks_do(start: int, expected: int) -> None:
    """The first draft needs no slot; each other one is drafted from a row of its own."""
    plan = StepPlan((drafted("a", [1], start, num_blocks=2),))
    assert plan_drafts(plan, answers((2,)), {"a": 4}, BLOCK_SIZE).inputs.num_drafts == (expected,)


def test_a_part_of_a_prompt_must_say_what_follows() -> None:
    plan = StepPlan((Chunk("a", [1, 2], 0, [0], None),))
    with pytest.raises(ValueError, match="request a: the token after its chunk is not known"):
        plan_drafts(plan, [], {}, BLOCK_SIZE)


@pytest.mark.parametrize("num_drafts", [(), (3, 1, 1)])
def test_unpack_is_the_inverse_of_pack(num_drafts: tuple[int, ...]) -> None:
    rows = torch.arange(len(num_drafts)) * 2
    inputs = DraftInput(torch.arange(7), rows, rows + 1, num_drafts)
    again = unpack(pack(inputs))
    assert torch.equal(again.next_token_ids, inputs.next_token_ids)
    assert torch.equal(again.rows, inputs.rows) and torch.equal(again.chunks, inputs.chunks)
    assert again.num_drafts == num_drafts
