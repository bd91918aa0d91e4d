from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

import httpx
import pytest
from asgi_exchange import Exchange
from scripted_engine import Accept, Pause, ScriptedEngine, Step, scripted_logprobs

from nybble.engine.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
)
from nybble.engine.messages import CacheExplanation
from nybble.engine.tokenizer import Tokenizer
from nybble.server.access.prices import Prices
from nybble.server.app import create_app
from nybble.server.keep_alive import COMMENT
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig

T = TypeVar("T")

CHAT = "/v1/chat/completions"
CONFIG = ServerConfig(
    max_body_bytes=2000, prices=Prices(input_price=1.0, output_price=10.0, cached_price=0.25)
)
DIED = EngineDeadError("the engine stopped before the request was finished; send it again")

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, timeout=30))  # reached only by a test that fails


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields


def _request(
    engine: ScriptedEngine, model: ServedModel, method: str, url: str, **options: Any
) -> httpx.Response:
    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(engine, model, CONFIG), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, url, **options)

    return _run(request())


def _chat(engine: ScriptedEngine, model: ServedModel, /, **fields: Any) -> httpx.Response:
    return _request(engine, model, "POST", CHAT, json=_body(**fields))


def _answer(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer: dict[str, Any] = response.json()
    return answer


def _chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks before [DONE], with the framing checked to the byte."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def _content(chunks: Sequence[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def _error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


# --- answers


TEXTS = ["hello world", "", "naïve 😀 €", "a\n\nb\r\n", 'data: {"x": 1}', "x<think>y</think>\u2028\x00\ufeff"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [None, "o w", ["\n", "zz"], "😀"])
def test_streamed_or_not_the_content_is_the_same(
    model: ServedModel, end_id: int, text: str, stop: str | list[str] | None
) -> None:
    script = [*model.tokenizer.encode(text), end_id]
    answer = _answer(_chat(ScriptedEngine(script), model, stop=stop))
    chunks = _chunks(_chat(ScriptedEngine(script), model, stop=stop, stream=True))
    content = answer["choices"][0]["message"]["content"]
    stops = [stop] if isinstance(stop, str) else stop or []
    assert content == min((text.split(one)[0] for one in stops), key=len, default=text)
    assert _content(chunks) == content
    assert chunks[-1]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"] == "stop"


def test_the_whole_answer(model: ServedModel, end_id: int) -> None:
    answer = _answer(_chat(ScriptedEngine([*b"ok", end_id], num_cached_tokens=2), model))
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > model.created
    timings = answer.pop("timings")
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (2, 2, 3)
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "system_fingerprint": "fp_tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ok", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 3,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "estimated_cost": pytest.approx((2 * 1.0 + 2 * 0.25 + 3 * 10.0) / 1e6),
        },
    }


def test_choices_streamed_or_not(model: ServedModel, end_id: int) -> None:
    engine = ScriptedEngine([*b"ok", end_id], num_cached_tokens=2)
    answer = _answer(_chat(engine, model, n=3, seed=1))
    assert [(choice["index"], choice["message"]["content"]) for choice in answer["choices"]] == [
        (0, "ok"),
        (1, "ok"),
        (2, "ok"),
    ]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 9, 13)
    assert usage["estimated_cost"] == pytest.approx((2 * 1.0 + 2 * 0.25 + 9 * 10.0) / 1e6)
    chunks = _chunks(_chat(ScriptedEngine([*b"ok", end_id]), model, n=3, stream=True))
    for index in range(3):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [choice["delta"] for choice in own] == [
            {"role": "assistant", "content": ""},
            {"content": "o"},
            {"content": "k"},
            {},
        ]
        assert [choice["finish_reason"] for choice in own] == [None, None, None, "stop"]


def test_an_engine_that_dies_ends_all_choices_with_one_error(model: ServedModel) -> None:
    engine = ScriptedEngine([65, DIED])
    assert _error(_chat(engine, model, n=2), 503)["code"] == "engine_dead"


def test_a_parameter_that_the_engine_refuses_is_named(model: ServedModel) -> None:
    engine = ScriptedEngine(
        [InvalidRequestError("logit_bias: token id 9000 is not in 0 .. 99", "logit_bias")]
    )
    error = _error(_chat(engine, model, n=2, logit_bias={"9000": 1}), 400)
    assert error["param"] == "logit_bias" and "token id 9000" in error["message"]


def test_a_cache_miss_is_explained_to_who_asks(model: ServedModel) -> None:
    explanation = CacheExplanation(reason="different_token", first_differing_token=1)
    for fields, details in [
        ({}, {"cached_tokens": 0}),
        (
            {"explain_cache": True},
            {
                "cached_tokens": 0,
                "cache_miss": {"reason": "different_token", "first_differing_token": 1, "text": "h"},
            },
        ),
    ]:
        engine = ScriptedEngine([65], explanation=explanation)
        usage = _answer(_chat(engine, model, cache_salt="ann", **fields))["usage"]
        assert usage["prompt_tokens_details"] == details
        assert engine.requests[0].cache_salt == "ann"


def test_an_explanation_needs_a_usage_to_be_in(model: ServedModel) -> None:
    refused = _chat(ScriptedEngine([65]), model, explain_cache=True, stream=True)
    assert _error(refused, 400)["param"] == "explain_cache"
    options = {"include_usage": True}
    explanation = CacheExplanation(reason="evicted")
    engine = ScriptedEngine([65], explanation=explanation)
    chunks = _chunks(_chat(engine, model, explain_cache=True, stream=True, stream_options=options))
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cache_miss"] == {"reason": "evicted"}


def test_the_chunks_of_a_stream(model: ServedModel, end_id: int) -> None:
    chunks = _chunks(_chat(ScriptedEngine([*b"ok", end_id]), model, stream=True))
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in [
            ({"role": "assistant", "content": ""}, None),
            ({"content": "o"}, None),
            ({"content": "k"}, None),
            ({}, "stop"),
        ]
    ]
    first = chunks[0]
    assert first["id"].startswith("chatcmpl-")
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"fp_tiny"}
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in chunks} == {
        (first["id"], first["created"], "tiny", "chat.completion.chunk")
    }
    assert not any("usage" in chunk for chunk in chunks)


def test_two_answers_have_two_ids(model: ServedModel) -> None:
    engine = ScriptedEngine([65])
    ids = {_answer(_chat(engine, model))["id"] for _ in range(2)}
    assert ids == {request.request_id for request in engine.requests}
    assert len(ids) == 2


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
@pytest.mark.parametrize("is_stream", [True, False])
def test_the_engines_finish_reason(model: ServedModel, finish_reason: Any, is_stream: bool) -> None:
    response = _chat(ScriptedEngine([65], finish_reason), model, stream=is_stream)
    last = _chunks(response)[-1] if is_stream else _answer(response)
    assert last["choices"][0]["finish_reason"] == finish_reason


def test_streamed_usage(model: ServedModel, end_id: int) -> None:
    def engine() -> ScriptedEngine:
        return ScriptedEngine([*b"ok", end_id], num_cached_tokens=3)

    options = {"include_usage": True}
    *chunks, last = _chunks(_chat(engine(), model, stream=True, stream_options=options))
    assert last["choices"] == []
    assert last["usage"] == _answer(_chat(engine(), model))["usage"]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert (last["id"], last["model"]) == (chunks[0]["id"], "tiny")
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("options", [{}, {"include_usage": True}])
@pytest.mark.parametrize("n", [1, 3])
def test_the_last_chunk_has_timings(model: ServedModel, options: dict[str, bool], n: int) -> None:
    response = _chat(ScriptedEngine([*b"ok"]), model, stream=True, stream_options=options, n=n)
    *chunks, last = _chunks(response)
    assert not any("timings" in chunk for chunk in chunks)
    assert last["timings"]["predicted_n"] == 2 * n


def test_usage_in_every_chunk(model: ServedModel) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    role, *others = _chunks(_chat(ScriptedEngine([*b"abc"]), model, stream=True, stream_options=options))
    assert role["usage"]["completion_tokens"] == 1
    assert [chunk["usage"]["completion_tokens"] for chunk in others] == [1, 2, 3, 3, 3]
    assert others[-1]["choices"] == []


@pytest.mark.parametrize("options", [{}, {"include_usage": False}, {"continuous_usage_stats": True}])
def test_no_usage_unless_asked_for(model: ServedModel, options: dict[str, bool]) -> None:
    chunks = _chunks(_chat(ScriptedEngine([65]), model, stream=True, stream_options=options))
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("num_top", [0, 2])
def test_logprobs_in_both_modes(model: ServedModel, end_id: int, num_top: int) -> None:
    script = [*"€a".encode(), end_id]
    fields = {"logprobs": True, "top_logprobs": num_top}
    logprobs = _answer(_chat(ScriptedEngine(script), model, **fields))["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [(entry["bytes"], entry["logprob"]) for entry in logprobs["content"]] == [
        ([token_id], scripted_logprobs(token_id, 0).logprob) for token_id in script[:-1]
    ]
    assert [len(entry["top_logprobs"]) for entry in logprobs["content"]] == [num_top] * 4
    streamed = []
    for chunk in _chunks(_chat(ScriptedEngine(script), model, stream=True, **fields)):
        of_chunk = chunk["choices"][0]["logprobs"]
        streamed += of_chunk["content"] if of_chunk else []
    assert streamed == logprobs["content"]


def test_logprobs_end_at_the_stop_string(model: ServedModel) -> None:
    answer = _answer(_chat(ScriptedEngine([*b"abcd"]), model, logprobs=True, stop="bc"))
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "a"


def test_what_the_engine_is_asked(model: ServedModel) -> None:
    engine = ScriptedEngine([65])
    _answer(_chat(engine, model, temperature=0, seed=3, max_tokens=9, top_logprobs=4, logprobs=True))
    (request,) = engine.requests
    assert request.prompt_token_ids == model.tokenizer.encode("<|user|>hi<|assistant|>")
    sampling = request.sampling
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0, 3, 9)
    assert (sampling.num_logprobs, sampling.stop_token_ids) == (4, model.stop_token_ids)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_stop_string_aborts_the_engines_request(model: ServedModel, is_stream: bool) -> None:
    engine = ScriptedEngine([*b"abcdef"])
    response = _chat(engine, model, stop="cd", stream=is_stream)
    assert response.status_code == 200
    assert engine.aborts == [engine.requests[0].request_id]
    assert engine.num_emitted == 4


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_finished_request_is_not_aborted(model: ServedModel, is_stream: bool) -> None:
    engine = ScriptedEngine([*b"abcd"])
    assert _chat(engine, model, stop="cd", stream=is_stream).status_code == 200
    assert engine.aborts == []


def test_tokens_are_sent_as_they_come(model: ServedModel) -> None:
    async def scenario() -> None:
        pauses = [Pause(), Pause()]
        engine = ScriptedEngine([65, pauses[0], 66, pauses[1], 67])
        exchange = Exchange(create_app(engine, model, CONFIG), _body(stream=True))
        task = exchange.start()
        for letter, pause in zip((b'"A"', b'"B"'), pauses, strict=True):
            await exchange.content_received(letter)
            pause.resumed.set()
        await task
        assert b'"C"' in exchange.body

    _run(scenario())


def test_a_stream_is_not_to_be_buffered(model: ServedModel) -> None:
    headers = _chat(ScriptedEngine([65]), model, stream=True).headers
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"


def test_every_answer_has_a_request_id(model: ServedModel) -> None:
    for fields in ({}, {"stream": True}, {"temperature": 9}):
        assert len(_chat(ScriptedEngine([65]), model, **fields).headers["x-request-id"]) == 32
    headers = {"x-request-id": "mine"}
    failed = _request(ScriptedEngine([RuntimeError()]), model, "POST", CHAT, json=_body(), headers=headers)
    assert (failed.status_code, failed.headers.get_list("x-request-id")) == (500, ["mine"])


# --- errors


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 1999, b"null"])
def test_a_malformed_body(model: ServedModel, content: bytes) -> None:
    error = _error(_request(ScriptedEngine([65]), model, "POST", CHAT, content=content), 400)
    assert error["type"] == "invalid_request_error"


def test_thoughts_and_calls_on_the_wire(glm: ServedModel) -> None:
    text = "R</think><tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call><|observation|>"
    script = glm.tokenizer.encode(text)
    tools = [{"type": "function", "function": {"name": "f"}}]
    (choice,) = _answer(_chat(ScriptedEngine(script), glm, tools=tools))["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "R",
        "reasoning": "R",
        "refusal": None,
    }
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    chunks = _chunks(_chat(ScriptedEngine(script), glm, tools=tools, stream=True))
    _, thought, start, arguments, end, last = [chunk["choices"][0] for chunk in chunks]
    assert thought["delta"] == {"reasoning_content": "R", "reasoning": "R"}
    assert start["delta"]["tool_calls"][0].pop("id").startswith("call_")
    function = {"name": "f", "arguments": ""}
    assert start["delta"] == {"tool_calls": [{"index": 0, "type": "function", "function": function}]}
    assert arguments["delta"] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"x": 1'}}]}
    assert end["delta"] == {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


def test_a_bad_field(model: ServedModel) -> None:
    engine = ScriptedEngine([65])
    error = _error(_chat(engine, model, messages=[{"role": "user", "content": [{"type": 1}]}]), 400)
    assert error["param"] == "messages[0].content[0].type"
    assert engine.requests == []


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "huge"}, 404, "model", "model_not_found"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "unsupported_parameter"),
        ({"max_tokens": 61}, 400, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "forbidden"}]}, 422, "messages", None),
    ],
)
def test_refused_before_the_engine(
    model: ServedModel, is_stream: bool, fields: dict[str, Any], status: int, param: str, code: str | None
) -> None:
    engine = ScriptedEngine([65])
    error = _error(_chat(engine, model, stream=is_stream, **fields), status)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert engine.requests == []


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/edits", "/v1/chat", "/v2/models", "/docs"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_such_route(model: ServedModel, path: str, method: str) -> None:
    error = _error(_request(ScriptedEngine([]), model, method, path), 404)
    assert error["message"] == f"no such route: {method} {path}"


def test_too_large_by_what_is_declared(model: ServedModel) -> None:
    """Refused unread: what is sent is small."""
    headers = {"Content-Length": "2001"}
    response = _request(ScriptedEngine([]), model, "POST", CHAT, content=b"{}", headers=headers)
    error = _error(response, 413)
    assert error["code"] == "request_too_large"
    assert "2000 bytes" in error["message"]


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "10"}, {"Content-Length": "x"}])
def test_too_large_by_what_is_sent(model: ServedModel, headers: dict[str, str]) -> None:
    num_read = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal num_read
        for _ in range(100):
            num_read += 1
            yield b" " * 500

    response = _request(ScriptedEngine([]), model, "POST", CHAT, content=pieces(), headers=headers)
    assert _error(response, 413)["code"] == "request_too_large"
    assert num_read == 5


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br, gzip", 415), ("Identity", 200)])
def test_a_body_is_not_compressed(model: ServedModel, encoding: str, status: int) -> None:
    headers = {"Content-Encoding": encoding}
    content = json.dumps(_body()).encode()
    response = _request(ScriptedEngine([65]), model, "POST", CHAT, content=content, headers=headers)
    assert response.status_code == status
    if status == 415:
        error = _error(response, 415)
        assert error["code"] == "unsupported_encoding" and repr(encoding) in error["message"]


def test_the_largest_body_is_read(model: ServedModel) -> None:
    body = json.dumps(_body()).encode().ljust(2000)
    _answer(_request(ScriptedEngine([65]), model, "POST", CHAT, content=body))


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_dead_engine(model: ServedModel, is_stream: bool) -> None:
    response = _chat(ScriptedEngine([65], is_alive=False), model, stream=is_stream)
    error = _error(response, 503)
    assert (error["type"], error["code"]) == ("server_error", "engine_dead")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize(("script", "is_stream"), [([DIED], True), ([DIED], False), ([65, 66, DIED], False)])
def test_the_engine_dies_before_anything_is_sent(
    model: ServedModel, script: list[Step], is_stream: bool
) -> None:
    error = _error(_chat(ScriptedEngine(script), model, stream=is_stream), 503)
    assert (error["message"], error["code"]) == (str(DIED), "engine_dead")


def test_the_engine_dies_in_mid_stream(model: ServedModel) -> None:
    response = _chat(
        ScriptedEngine([65, 66, DIED]), model, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = _chunks(response)
    assert _content(chunks) == "AB"
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])
    assert last == {
        "error": {"message": str(DIED), "type": "server_error", "param": None, "code": "engine_dead"}
    }


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_full_queue(model: ServedModel, is_stream: bool) -> None:
    full = QueueFullError("7 requests are waiting", retry_after=12.3)
    response = _chat(ScriptedEngine([full]), model, stream=is_stream)
    assert response.headers["retry-after"] == "13"
    assert _error(response, 429) == {
        "message": "7 requests are waiting",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }


TIMEOUT = RequestTimeoutError("the request's time was over")
FAILED = RequestFailedError("the engine failed in a step of this request: OutOfMemoryError")
ENDS = [(TIMEOUT, 504, "timeout_error", "timeout"), (FAILED, 500, "server_error", "engine_error")]


@pytest.mark.parametrize(("error", "status", "kind", "code"), ENDS)
@pytest.mark.parametrize(("num_tokens", "is_stream"), [(0, True), (0, False), (2, False)])
def test_a_request_that_fails_before_anything_is_sent(
    model: ServedModel, error: Exception, status: int, kind: str, code: str, num_tokens: int, is_stream: bool
) -> None:
    engine = ScriptedEngine([*[65] * num_tokens, error])
    answer = _error(_chat(engine, model, stream=is_stream), status)
    assert (answer["message"], answer["type"], answer["code"]) == (str(error), kind, code)
    assert engine.is_alive


@pytest.mark.parametrize(("error", "status", "kind", "code"), ENDS)
def test_a_request_that_fails_in_mid_stream(
    model: ServedModel, error: Exception, status: int, kind: str, code: str
) -> None:
    *chunks, last = _chunks(_chat(ScriptedEngine([65, 66, error]), model, stream=True))
    assert _content(chunks) == "AB"
    assert (last["error"]["message"], last["error"]["type"], last["error"]["code"]) == (
        str(error),
        kind,
        code,
    )


def test_priority_and_timeout_reach_the_engine(model: ServedModel) -> None:
    engine = ScriptedEngine([65])
    _answer(_chat(engine, model, priority=-3, timeout=1.5))
    _answer(_chat(engine, model))
    hasty, other = engine.requests
    assert hasty.priority == -3 and hasty.deadline is not None and 0 < hasty.deadline <= 1.5
    assert (other.priority, other.deadline) == (0, None)


@pytest.mark.parametrize(
    ("field", "value"), [("timeout", 0), ("timeout", -1), ("timeout", "soon"), ("priority", 2**31)]
)
def test_priority_and_timeout_have_ranges(model: ServedModel, field: str, value: object) -> None:
    engine = ScriptedEngine([65])
    assert _error(_chat(engine, model, **{field: value}), 400)["param"] == field
    assert not engine.requests


@pytest.mark.parametrize("is_stream", [True, False])
def test_the_engine_refuses(model: ServedModel, is_stream: bool) -> None:
    script = [InvalidRequestError("top_k: too large", "top_k")]
    error = _error(_chat(ScriptedEngine(script), model, stream=is_stream), 400)
    assert (error["message"], error["param"], error["code"]) == ("top_k: too large", "top_k", None)


def test_the_engine_finds_the_context_too_short(model: ServedModel) -> None:
    script = [ContextLengthError("too long", "max_tokens")]
    error = _error(_chat(ScriptedEngine(script), model), 400)
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_unexpected_error_tells_the_client_nothing(model: ServedModel, is_stream: bool) -> None:
    """The traceback is for the log: Starlette raises the error again, and uvicorn logs it."""
    response = _chat(ScriptedEngine([RuntimeError("secret")]), model, stream=is_stream)
    error = _error(response, 500)
    assert error["type"] == "server_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_an_unexpected_error_in_mid_stream(model: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    response = _chat(ScriptedEngine([65, RuntimeError("secret")]), model, stream=True)
    assert _chunks(response)[-1]["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "a request failed: RuntimeError" in caplog.text and "secret" not in caplog.text


# --- streams whose first token takes long


def test_a_stream_begins_before_its_first_token(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.server.event_stream._KEEP_ALIVE_SECONDS", 0.05)

    async def scenario() -> None:
        pause = Pause()
        exchange, task = _exchange(ScriptedEngine([Accept(), pause, *b"ok"]), model, is_stream=True)
        await exchange.content_received(COMMENT * 2)
        assert (exchange.status, exchange.body.replace(COMMENT, b"")) == (200, b"")
        pause.resumed.set()
        await task
        assert b'"content":"o"' in exchange.body and exchange.body.endswith(b"data: [DONE]\n\n")

    _run(scenario())


@pytest.mark.parametrize("script", [[], [Accept()]], ids=["refused", "accepted"])
def test_an_error_soon_after_is_a_status_yet(model: ServedModel, script: list[Step]) -> None:
    response = _chat(ScriptedEngine([*script, QueueFullError("full", 3)]), model, stream=True)
    assert _error(response, 429)["code"] == "queue_full"


def test_nothing_is_sent_while_the_engine_may_refuse(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.server.event_stream._KEEP_ALIVE_SECONDS", 0.01)

    async def scenario() -> None:
        pause = Pause()
        exchange, task = _exchange(ScriptedEngine([pause, QueueFullError("full", 3)]), model, is_stream=True)
        await pause.reached.wait()
        await asyncio.sleep(0.1)
        assert exchange.messages == []
        pause.resumed.set()
        await task
        assert exchange.status == 429

    _run(scenario())


def test_an_error_after_the_status_is_an_event(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.server.event_stream._KEEP_ALIVE_SECONDS", 0.01)

    async def scenario() -> None:
        pause = Pause()
        script = [Accept(), pause, RequestTimeoutError("too late")]
        exchange, task = _exchange(ScriptedEngine(script), model, is_stream=True)
        await exchange.content_received(COMMENT)
        pause.resumed.set()
        await task
        assert exchange.status == 200 and b'"code":"timeout"' in exchange.body

    _run(scenario())


# --- clients that go away


def _exchange(
    engine: ScriptedEngine, model: ServedModel, is_stream: bool
) -> tuple[Exchange, asyncio.Task[None]]:
    exchange = Exchange(create_app(engine, model, CONFIG), _body(stream=is_stream))
    return exchange, exchange.start()


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("before", [[], [65, 66], [Accept()]])
@pytest.mark.parametrize("patience", [0.0, 10.0])
def test_a_client_that_disconnects_aborts_its_request(
    model: ServedModel,
    is_stream: bool,
    before: list[Step],
    patience: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nybble.server.event_stream._KEEP_ALIVE_SECONDS", patience or 0.01)

    async def scenario() -> None:
        pause = Pause()
        engine = ScriptedEngine([*before, pause, 67])
        exchange, task = _exchange(engine, model, is_stream)
        await pause.reached.wait()
        if not patience:
            await asyncio.sleep(0.05)  # a stream has begun, if it may
        exchange.disconnect()
        await task
        assert engine.aborts == [engine.requests[0].request_id]
        assert engine.num_emitted == before.count(65) * 2

    _run(scenario())


def test_a_slow_reader_that_disconnects_aborts_its_request(model: ServedModel) -> None:
    async def scenario() -> None:
        pause = Pause()
        engine = ScriptedEngine([65, pause, 66, Pause(), 67])
        exchange, task = _exchange(engine, model, is_stream=True)
        await exchange.content_received(b'"A"')
        exchange.is_reading.clear()
        pause.resumed.set()
        await exchange.send_blocked.wait()
        exchange.disconnect()
        await task
        assert engine.aborts == [engine.requests[0].request_id]
        assert engine.num_emitted == 2

    _run(scenario())


def test_a_client_that_disconnects_while_sending(model: ServedModel) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([65])
        exchange = Exchange(create_app(engine, model, CONFIG), _body(), is_complete=False)
        task = exchange.start()
        exchange.disconnect()
        await task
        assert engine.requests == []

    _run(scenario())


def test_one_clients_disconnection_leaves_the_others(model: ServedModel) -> None:
    async def scenario() -> None:
        pauses = [Pause(), Pause()]
        engines = [ScriptedEngine([65, pause, 66]) for pause in pauses]
        (gone, gone_task), (other, other_task) = (_exchange(engine, model, True) for engine in engines)
        await asyncio.gather(*(pause.reached.wait() for pause in pauses))
        gone.disconnect()
        await gone_task
        pauses[1].resumed.set()
        await other_task
        assert other.body.endswith(b"data: [DONE]\n\n")
        assert b'"B"' in other.body
        assert engines[1].aborts == []

    _run(scenario())


# --- models and health


def _model_object(model: ServedModel) -> dict[str, Any]:
    return {
        "id": "tiny",
        "object": "model",
        "created": model.created,
        "owned_by": "nybble",
        "max_model_len": model.max_model_len,
    }


def test_models(model: ServedModel) -> None:
    answer = _answer(_request(ScriptedEngine([]), model, "GET", "/v1/models"))
    assert answer == {"object": "list", "data": [_model_object(model)]}


def test_a_model(model: ServedModel) -> None:
    assert _answer(_request(ScriptedEngine([]), model, "GET", "/v1/models/tiny")) == _model_object(model)


def test_a_model_with_a_slash_in_its_name(tokenizer: Tokenizer, model: ServedModel) -> None:
    renamed = ServedModel(
        name="org/tiny",
        tokenizer=tokenizer,
        max_model_len=64,
        stop_token_ids=(),
        sampling_defaults=model.sampling_defaults,
        created=1,
        fingerprint="fp",
    )
    answer = _answer(_request(ScriptedEngine([]), renamed, "GET", "/v1/models/org/tiny"))
    assert answer["id"] == "org/tiny"


@pytest.mark.parametrize("name", ["huge", "tiny/", "tin", "TINY"])
def test_another_model(model: ServedModel, name: str) -> None:
    error = _error(_request(ScriptedEngine([]), model, "GET", f"/v1/models/{name}"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("is_alive", [True, False])
def test_health(model: ServedModel, is_alive: bool) -> None:
    response = _request(ScriptedEngine([], is_alive=is_alive), model, "GET", "/health")
    if is_alive:
        assert _answer(response) == {"status": "ok"}
    else:
        assert _error(response, 503)["type"] == "server_error"
        assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("blocked", ["http.response.start", "http.response.body"])
def test_a_reader_that_never_reads_aborts_its_request(model: ServedModel, blocked: str) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([65, 66, Pause(), 67])
        app = create_app(engine, model, ServerConfig())

        async def slow_app(scope: Any, receive: Any, send: Any) -> None:
            async def slow_send(message: Any) -> None:
                if message["type"] == blocked:
                    exchange.is_reading.clear()
                await send(message)

            await app(scope, receive, slow_send)

        exchange = Exchange(slow_app, BODY | {"stream": True})
        task = exchange.start()
        await exchange.send_blocked.wait()
        exchange.disconnect()
        await task
        assert engine.aborts == [engine.requests[0].request_id]

    asyncio.run(asyncio.wait_for(scenario(), timeout=30))
