from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from msgspec import UNSET
from scripted_engine import Pause, ScriptedEngine, Step, Together

from nybble.engine.errors import EngineDeadError
from nybble.engine.messages import SamplingParams
from nybble.server.access.prices import Prices
from nybble.server.chat.chat_request import ChatRequest
from nybble.server.chat.completion import Completion
from nybble.server.chat.replay_store import ReplayStore
from nybble.server.chat.tools import Tools
from nybble.server.requests.sampling_options import choice_sampling
from nybble.server.requests.schemas import ChatCompletion, ChatCompletionChunk
from nybble.server.served_model import ServedModel

REQUEST = ChatRequest(
    prompt_token_ids=(1, 2, 3, 4, 5),
    sampling=SamplingParams(max_tokens=9),
    num_choices=1,
    stop_strings=(),
    cache_salt="",
    explain_cache=False,
    is_stream=True,
    include_usage=False,
)


def _completion(engine: ScriptedEngine, model: ServedModel, **changes: Any) -> Completion:
    prices = Prices(input_price=1.0, output_price=10.0, cached_price=0.25)
    replay = ReplayStore(model.tokenizer, max_tokens=1000)
    return Completion(replace(REQUEST, **changes), engine, model, prices, replay)


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


def test_choices_have_numbers_seeds_and_ids_of_their_own(model: ServedModel, end_id: int) -> None:
    engine = ScriptedEngine([65, 66, end_id], num_cached_tokens=4)
    sampling = SamplingParams(max_tokens=9, seed=5)
    chunks = _chunks(engine, model, num_choices=3, sampling=sampling, include_usage=True)
    texts, roles, reasons = [""] * 3, [0] * 3, [""] * 3
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        roles[choice.index] += choice.delta.role is not UNSET
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] += choice.finish_reason or ""
    assert (texts, roles, reasons) == (["AB"] * 3, [1] * 3, ["stop"] * 3)
    assert len({request.sampling.seed for request in engine.requests}) == 3
    assert engine.requests[0].sampling.seed == 5
    assert len({request.request_id for request in engine.requests}) == 3
    usage = chunks[-1].usage
    assert usage and usage is not UNSET
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 9)
    assert usage.prompt_tokens_details.cached_tokens == 4


def test_the_whole_has_all_choices_in_order(model: ServedModel) -> None:
    completion = _completion(ScriptedEngine([65, 66], "length"), model, num_choices=2)
    answer = asyncio.run(completion.whole())
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == ["AB", "AB"]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]


def test_the_first_choices_seed_is_the_requests_alone_and_others_are_reproducible() -> None:
    sampling = SamplingParams(max_tokens=9, seed=5)
    seeds = [choice_sampling(sampling, number).seed for number in range(8)]
    assert seeds == [choice_sampling(sampling, number).seed for number in range(8)]
    assert seeds[0] == 5 and len(set(seeds)) == 8
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    other = [choice_sampling(replace_seed(sampling, 6), number).seed for number in range(8)]
    assert not set(seeds) & set(other)


def replace_seed(sampling: SamplingParams, seed: int | None) -> SamplingParams:
    return msgspec.structs.replace(sampling, seed=seed)


def test_without_a_seed_choices_have_none() -> None:
    assert choice_sampling(SamplingParams(max_tokens=9), 3).seed is None


def test_stop_strings_wait_for_min_tokens(model: ServedModel) -> None:
    sampling = SamplingParams(max_tokens=9, min_tokens=3)
    chunks = _chunks(ScriptedEngine([*b"abababab"]), model, sampling=sampling, stop_strings=("ab",))
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert content == "abab"  # from the fourth token on, the first whole "ab" is the third


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


THINKING = {"has_thinking": True, "is_thinking": True}


def _whole(text: str, model: ServedModel, **changes: Any) -> ChatCompletion:
    engine = ScriptedEngine([*model.tokenizer.encode(text)], "length")
    return asyncio.run(_completion(engine, model, **changes).whole())


def test_a_thought_and_an_answer_by_both_names(glm: ServedModel) -> None:
    answer = _whole("ab\n</think>\nc", glm, **THINKING)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == ("ab", "ab", "c")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 4


def test_length_within_a_thought(glm: ServedModel) -> None:
    (choice,) = _whole("ab", glm, **THINKING).choices
    assert (choice.finish_reason, choice.message.content) == ("length", None)
    assert choice.message.reasoning_content == "ab"


def test_without_a_thought_there_are_no_fields_for_it(glm: ServedModel) -> None:
    message = _whole("</think>c", glm, **THINKING).choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == (UNSET, UNSET, "c")


def test_thoughts_as_a_stream(glm: ServedModel) -> None:
    script = [*glm.tokenizer.encode("a b</think>\nc")]
    sampling = SamplingParams(max_tokens=9, num_logprobs=0)
    chunks = _chunks(ScriptedEngine(script), glm, **THINKING, sampling=sampling)
    choices = [chunk.choices[0] for chunk in chunks]
    assert [(c.delta.reasoning_content, c.delta.reasoning, c.delta.content) for c in choices] == [
        (UNSET, UNSET, ""),
        ("a", "a", UNSET),
        (" b", " b", UNSET),
        (UNSET, UNSET, "c"),
        (UNSET, UNSET, UNSET),
    ]
    sent = [entry.token for c in choices if c.logprobs for entry in c.logprobs.content]
    assert "".join(sent) == "a b</think>\nc"


TOOLS = Tools([{"type": "function", "function": {"name": "f"}}], is_parallel=True)
CALLS = "A\n<tool_call>f</tool_call><tool_call>g<arg_key>n</arg_key><arg_value>1</arg_value></tool_call>"


@pytest.mark.parametrize(
    ("tools", "wanted"),
    [(TOOLS, [("f", "{}"), ("g", '{"n": 1}')]), (replace(TOOLS, is_parallel=False), [("f", "{}")])],
)
def test_tool_calls_streamed_or_not(glm: ServedModel, tools: Tools, wanted: list[tuple[str, str]]) -> None:
    script = [*glm.tokenizer.encode(CALLS + "<|observation|>")]
    engine = ScriptedEngine(script)
    (choice,) = asyncio.run(_completion(engine, glm, tools=tools).whole()).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "A")
    assert choice.message.tool_calls is not UNSET
    assert [(c.function.name, c.function.arguments) for c in choice.message.tool_calls] == wanted
    assert bool(engine.aborts) == (len(wanted) == 1)  # one call is enough: the rest is not generated
    streamed: dict[int, tuple[str, str]] = {}
    chunks = _chunks(ScriptedEngine(script), glm, tools=tools)
    for call in (c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()):
        name, arguments = streamed.get(call.index, ("", ""))
        streamed[call.index] = (name + (call.function.name or ""), arguments + call.function.arguments)
    assert list(streamed.values()) == wanted
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_length_within_a_call(glm: ServedModel) -> None:
    (choice,) = _whole("<tool_call>f<arg_key>n", glm, tools=TOOLS).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not UNSET
    assert [c.function.arguments for c in choice.message.tool_calls] == [""]


def test_tokens_that_come_together_are_one_chunk(model: ServedModel) -> None:
    engine = ScriptedEngine([65, Together([66, 67]), 68], "length")
    chunks = _chunks(engine, model, include_usage=True)
    contents = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    assert contents == ["", "A", "BC", "D", UNSET]
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 4


def test_tokens_after_a_stop_string_are_not_counted(model: ServedModel) -> None:
    engine = ScriptedEngine([65, Together([66, 67, 68]), 69])
    chunks = _chunks(engine, model, include_usage=True, stop_strings=("C",))
    assert [choice.delta.content for chunk in chunks for choice in chunk.choices] == ["", "A", "B", UNSET]
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 3
    assert engine.aborts
