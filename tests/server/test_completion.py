from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from msgspec import UNSET
from scripted_engine import Pause, ScriptedEngine, Step

from nybble.engine.errors import EngineDeadError
from nybble.engine.messages import SamplingParams
from nybble.server.chat_request import ChatRequest
from nybble.server.completion import Completion
from nybble.server.prices import Prices
from nybble.server.schemas import ChatCompletionChunk
from nybble.server.served_model import ServedModel

REQUEST = ChatRequest(
    prompt_token_ids=(1, 2, 3, 4, 5),
    sampling=SamplingParams(max_tokens=9),
    stop_strings=(),
    is_stream=True,
    include_usage=False,
)


def _completion(engine: ScriptedEngine, model: ServedModel, **changes: Any) -> Completion:
    prices = Prices(input_price=1.0, output_price=10.0, cached_price=0.25)
    return Completion(replace(REQUEST, **changes), engine, model, prices)


def _chunks(engine: ScriptedEngine, model: ServedModel, **changes: Any) -> list[ChatCompletionChunk]:
    async def collect() -> list[ChatCompletionChunk]:
        return [chunk async for chunk in _completion(engine, model, **changes).chunks()]

    return asyncio.run(collect())


def test_usage_counts_what_was_used_so_far(model: ServedModel) -> None:
    async def scenario() -> None:
        completion = _completion(ScriptedEngine([65, 66, 67], num_cached_tokens=4), model)
        used = [completion.usage()]
        async with aclosing(completion.deltas()) as deltas:
            async for _ in deltas:
                used.append(completion.usage())
        assert [usage.completion_tokens for usage in used] == [0, 1, 2, 3]
        assert [usage.total_tokens for usage in used] == [5, 6, 7, 8]
        assert [usage.prompt_tokens_details.cached_tokens for usage in used] == [0, 4, 4, 4]
        assert used[-1].estimated_cost == pytest.approx((1 * 1.0 + 4 * 0.25 + 3 * 10.0) / 1e6)

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["deltas", "chunks"])
def test_closing_early_aborts_at_once(model: ServedModel, method: str) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([65, 66, 67])
        completion = _completion(engine, model)
        pieces = completion.deltas() if method == "deltas" else completion.chunks()
        await anext(pieces)
        assert engine.aborts == []
        await pieces.aclose()
        assert engine.aborts == [completion.completion_id]
        assert engine.num_emitted == 1

    asyncio.run(scenario())


def test_cancelling_the_whole_aborts(model: ServedModel) -> None:
    async def scenario() -> None:
        pause = Pause()
        engine = ScriptedEngine([65, pause, 66])
        completion = _completion(engine, model)
        task = asyncio.create_task(completion.whole())
        await pause.reached.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert engine.aborts == [completion.completion_id]

    asyncio.run(scenario())


def test_the_engine_gets_the_request_under_the_answers_id(model: ServedModel) -> None:
    engine = ScriptedEngine([65])
    (chunk_id,) = {chunk.id for chunk in _chunks(engine, model)}
    (request,) = engine.requests
    assert request.request_id == chunk_id
    assert request.prompt_token_ids == REQUEST.prompt_token_ids
    assert request.sampling == REQUEST.sampling


def test_pieces_without_text_make_no_chunks(model: ServedModel, end_id: int) -> None:
    """A half character, text held back for a stop string, and the end of turn."""
    chunks = _chunks(ScriptedEngine([0xC3, 0xA9, ord("a"), ord("b"), end_id]), model, stop_strings=("abc",))
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "é", "ab", UNSET]


def test_an_answer_without_text(model: ServedModel, end_id: int) -> None:
    first, last = _chunks(ScriptedEngine([end_id]), model)
    assert (first.choices[0].delta.role, first.choices[0].finish_reason) == ("assistant", None)
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (UNSET, "stop")


@pytest.mark.parametrize(("script", "num_chunks"), [([], 0), ([65, 66], 3)])
def test_the_engines_death_passes_through(
    model: ServedModel, script: Sequence[Step], num_chunks: int
) -> None:
    async def scenario() -> None:
        chunks = []
        engine = ScriptedEngine([*script, EngineDeadError("gone")])
        with pytest.raises(EngineDeadError, match="gone"):
            async for chunk in _completion(engine, model, include_usage=True).chunks():
                chunks.append(chunk)
        assert len(chunks) == num_chunks  # with tokens, the role and each token; no usage
        assert engine.aborts == []

    asyncio.run(scenario())
