from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import openai
import pytest
from scripted_engine import Emit, Pause, ScriptedEngine, scripted_logprobs

from nybble.engine.errors import EngineDeadError
from nybble.engine.messages import AnswerEvent, Request, RequestAccepted, TokenLogprobs
from nybble.server.access.prices import Prices
from nybble.server.app import create_app
from nybble.server.requests.completion_request import parse_completion_request, prepare_completion_request
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig
from nybble.server.text.text_completion import TextCompletionRun

CONFIG = ServerConfig(prices=Prices(input_price=1.0, output_price=10.0, cached_price=0.25))


def _post(engine: ScriptedEngine, model: ServedModel, /, **fields: Any) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(engine, model, CONFIG), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"} | fields)

    return asyncio.run(asyncio.wait_for(post(), timeout=30))


def _answer(engine: ScriptedEngine, model: ServedModel, /, **fields: Any) -> dict[str, Any]:
    response = _post(engine, model, **fields)
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


def _chunks(engine: ScriptedEngine, model: ServedModel, /, **fields: Any) -> list[dict[str, Any]]:
    *events, done, rest = _post(engine, model, stream=True, **fields).content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def test_the_whole_answer(model: ServedModel, end_id: int) -> None:
    answer = _answer(ScriptedEngine([*b"ok", end_id], num_cached_tokens=1), model)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > model.created
    usage, timings = answer.pop("usage"), answer.pop("timings")
    assert (timings["cache_n"], timings["predicted_n"]) == (1, 3)
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": "fp_tiny",
        "choices": [{"text": "ok", "index": 0, "logprobs": None, "finish_reason": "stop"}],
    }
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 3, 5)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
    assert usage["estimated_cost"] == pytest.approx((1 * 1.0 + 1 * 0.25 + 3 * 10.0) / 1e6)


@pytest.mark.parametrize(
    "fields", [{}, {"echo": True}, {"stop": "o w"}, {"n": 3, "prompt": ["a", "b"]}, {"logprobs": 2}]
)
@pytest.mark.parametrize("text", ["hello world", "", "naïve 😀 €"])
def test_streamed_or_not_the_choices_are_the_same(
    model: ServedModel, end_id: int, text: str, fields: dict[str, Any]
) -> None:
    script = [*model.tokenizer.encode(text), end_id]
    whole = _answer(ScriptedEngine(script), model, **fields)["choices"]
    chunks = _chunks(ScriptedEngine(script), model, **fields)
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)
    for index, choice in enumerate(whole):
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        assert choice["index"] == index
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == [choice["finish_reason"]]
        if choice["logprobs"]:
            for key, values in choice["logprobs"].items():
                assert [v for one in own if one["logprobs"] for v in one["logprobs"][key]] == values
    assert len(whole) == len(fields.get("prompt", "x")) * fields.get("n", 1)


def test_answers_are_numbered_prompt_by_prompt(model: ServedModel) -> None:
    engine = ScriptedEngine([65], num_cached_tokens=1)
    answer = _answer(engine, model, prompt=["ab", "c"], n=2, echo=True, seed=1)
    wanted = [(0, "abA"), (1, "abA"), (2, "cA"), (3, "cA")]
    assert [(c["index"], c["text"]) for c in answer["choices"]] == wanted
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 4)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert len({request.request_id for request in engine.requests}) == 4
    assert len({request.sampling.seed for request in engine.requests}) == 4


def test_an_echo_comes_first_in_a_stream(model: ServedModel) -> None:
    first, *_ = _chunks(ScriptedEngine([65, 66]), model, echo=True)
    assert first["choices"][0]["text"] == "hiA"


def test_streamed_usage(model: ServedModel) -> None:
    *chunks, last = _chunks(ScriptedEngine([65, 66]), model, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"] == _answer(ScriptedEngine([65, 66]), model)["usage"]


def test_usage_in_every_chunk_and_timings_in_the_last(model: ServedModel) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = _chunks(ScriptedEngine([65, 66]), model, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] == 2
    assert not any("timings" in chunk for chunk in chunks)
    assert (last["timings"]["prompt_n"], last["timings"]["predicted_n"]) == (2, 2)
    *chunks, last = _chunks(ScriptedEngine([65, 66]), model, prompt=["hi", "ho"])
    assert not any("timings" in chunk for chunk in chunks)
    assert (last["timings"]["prompt_n"], last["timings"]["predicted_n"]) == (4, 4)


def test_accepted_is_when_all_prompts_are(model: ServedModel) -> None:
    async def scenario() -> None:
        body = {"model": "tiny", "prompt": ["a", "b"]}
        job = prepare_completion_request(parse_completion_request(json.dumps(body).encode()), model)
        engine = _AcceptingEngine()
        run = TextCompletionRun(job, engine, model, Prices())
        whole = asyncio.create_task(run.whole())
        await engine.accept()
        await asyncio.sleep(0)
        assert not run.accepted.is_set()
        await engine.accept()
        await asyncio.wait_for(run.accepted.wait(), 30)
        whole.cancel()

    asyncio.run(scenario())


class _AcceptingEngine(ScriptedEngine):
    """Takes a request when it is told to, and never answers it."""

    def __init__(self) -> None:
        super().__init__([])
        self._permits = asyncio.Semaphore(0)
        self._accepted = asyncio.Semaphore(0)

    async def accept(self) -> None:
        self._permits.release()
        await self._accepted.acquire()

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[AnswerEvent], None]:
        await self._permits.acquire()
        self._accepted.release()
        yield [RequestAccepted(request_id=request.request_id)]
        await asyncio.Event().wait()


def test_logprobs_in_the_old_shape(model: ServedModel, end_id: int) -> None:
    logprobs = _answer(ScriptedEngine([*"€ab".encode(), end_id]), model, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 0, 0, 1, 2, 3]
    assert logprobs["tokens"] == ["\ufffd", "\ufffd", "\ufffd", "a", "b", "<|end|>"]
    ids = [*"€ab".encode(), end_id]
    assert logprobs["token_logprobs"] == [scripted_logprobs(token_id, 0).logprob for token_id in ids]
    assert logprobs["top_logprobs"][3:5] == [
        {"a": -97 / 64, "b": -97 / 64 - 1},
        {"b": -98 / 64, "c": -98 / 64 - 1},
    ]


def _joined(chunks: list[dict[str, Any]], index: int) -> dict[str, list[Any]]:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    return {name: [item for part in parts for item in part[name]] for name in names}


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_echo_has_the_prompts_logprobs(model: ServedModel, end_id: int, is_stream: bool) -> None:
    """As lm-evaluation-harness asks for them: the last token is the generated one, a special one too."""
    fields = {"prompt": ["é<|end|>a", "hi"], "echo": True, "logprobs": 1, "max_tokens": 1, "n": 2}
    engine = ScriptedEngine([end_id], finish_reason="length")
    if is_stream:
        chunks = _chunks(engine, model, **fields)
        found = [_joined(chunks, index) for index in range(4)]
    else:
        choices = _answer(engine, model, **fields)["choices"]
        assert [choice["text"] for choice in choices] == ["é<|end|>a"] * 2 + ["hi"] * 2
        found = [choice["logprobs"] for choice in choices]
    assert found[0] == found[1] and found[2] == found[3]
    assert found[0]["tokens"] == ["\ufffd", "\ufffd", "<|end|>", "a", "<|end|>"]
    assert found[0]["text_offset"] == [0, 0, 1, 8, 9]
    assert found[0]["token_logprobs"] == [None, -0xA9 / 64, -end_id / 64, -97 / 64, -end_id / 64]
    assert found[2]["top_logprobs"] == [None, {"i": -105 / 64}, {"<|end|>": -end_id / 64}]
    asked = [request.sampling.num_prompt_logprobs for request in engine.requests]
    assert sorted(asked, key=str) == [1, 1, None, None]  # once for each prompt


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_prompt_alone(model: ServedModel, is_stream: bool) -> None:
    fields = {"echo": True, "logprobs": 0, "max_tokens": 0}
    engine = ScriptedEngine([65])
    if is_stream:
        answer, usage = _chunks(engine, model, stream_options={"include_usage": True}, **fields)
    else:
        answer = usage = _answer(engine, model, **fields)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -105 / 64]
    assert choice["logprobs"]["top_logprobs"] == [None, {"i": -105 / 64}]
    assert usage["usage"]["completion_tokens"] == 0
    assert engine.requests[0].sampling.max_tokens == 0


def test_the_token_that_came_is_among_the_likeliest(model: ServedModel) -> None:
    logprobs = TokenLogprobs(logprob=-5.0, top=((97, -0.1), (98, -3.0)))
    answer = _answer(ScriptedEngine([Emit(99, logprobs)]), model, logprobs=2)
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.1, "b": -3.0, "c": -5.0}]


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_engine_that_dies_is_answered(model: ServedModel, is_stream: bool) -> None:
    died = EngineDeadError("the engine stopped")
    response = _post(ScriptedEngine([died]), model, prompt=["a", "b"], n=2, stream=is_stream)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"


def test_one_answer_that_fails_ends_all(model: ServedModel) -> None:
    engine = ScriptedEngine([65, 66, EngineDeadError("the engine stopped")])
    *_, last = _chunks(engine, model, prompt=["a", "b"])
    assert last["error"]["code"] == "engine_dead"


def test_the_timeout_reaches_the_engine(model: ServedModel) -> None:
    engine = ScriptedEngine([65])
    _answer(engine, model, timeout=5, priority=2, cache_salt="s")
    (request,) = engine.requests
    assert request.deadline is not None and 0 < request.deadline <= 5
    assert (request.priority, request.cache_salt) == (2, "s")


def test_prompts_run_together(model: ServedModel) -> None:
    """The second starts while the first waits."""

    async def scenario() -> None:
        pause = Pause()
        engine = ScriptedEngine([pause, 65])
        transport = httpx.ASGITransport(create_app(engine, model, CONFIG))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model": "tiny", "prompt": ["a", "b", "c"]}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            while len(engine.requests) < 3:
                await asyncio.sleep(0.001)
            pause.resumed.set()
            assert [choice["text"] for choice in (await task).json()["choices"]] == ["A", "A", "A"]

    asyncio.run(asyncio.wait_for(scenario(), timeout=30))


def test_openais_client(model: ServedModel) -> None:
    async def scenario() -> None:
        transport = httpx.ASGITransport(create_app(ScriptedEngine([*b"abc"]), model, CONFIG))
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http) as client,
        ):
            completion = await client.completions.create(model="tiny", prompt=[[104]], logprobs=1, echo=False)
            assert completion.choices[0].text == "abc"
            assert completion.usage is not None and completion.usage.completion_tokens == 3
            stream = await client.completions.create(model="tiny", prompt="hi", stream=True)
            assert [chunk.choices[0].text async for chunk in stream] == ["a", "b", "c"]
            assert [one.id async for one in await client.models.list()] == ["tiny"]
            assert (await client.models.retrieve("tiny")).id == "tiny"

    asyncio.run(asyncio.wait_for(scenario(), timeout=30))
