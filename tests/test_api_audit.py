"""Every field that clients of such servers send, and what becomes of it here: a table, and its proof.

honoured: it changes what the engine is asked, or what the client gets
refused: a 400 that names it; the engine does not see the request
idle: a hint with nothing to do here, such as who the user is; nothing changes
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import glm_template
import httpx
import msgspec
import pytest
from scripted_engine import ScriptedEngine
from tiny_tokenizer import write_tokenizer

from nybble.engine.tokenizer import Tokenizer
from nybble.server.app import create_app
from nybble.server.requests.completion_schemas import CompletionRequest
from nybble.server.requests.schemas import ChatCompletionRequest
from nybble.server.served_model import SamplingDefaults, ServedModel
from nybble.server.server_config import ServerConfig

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = "<tool_call>look</tool_call>"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
THINKER = {"role": "assistant", "content": "so", "reasoning_content": "hm"}


@dataclass(frozen=True)
class Row:
    """beside: other fields, with and without this one; answer: what the model writes."""

    name: str
    value: object
    verdict: Literal["honoured", "refused", "idle"] = "honoured"
    beside: Mapping[str, Any] = field(default_factory=dict)
    answer: str = "hm</think>hello world"

    def __str__(self) -> str:
        return f"{self.name}={json.dumps(self.value)[:30]}"


SAMPLING = (
    Row("temperature", 0.3),
    Row("top_p", 0.3),
    Row("top_k", 5),
    Row("min_p", 0.1),
    Row("max_tokens", 7),
    Row("min_tokens", 2),
    Row("frequency_penalty", 0.5),
    Row("presence_penalty", 0.5),
    Row("repetition_penalty", 1.5),
    Row("logit_bias", {"5": 1}),
    Row("allowed_token_ids", [5]),
    Row("bad_words", ["x"]),
    Row("ignore_eos", True),
    Row("stop_token_ids", [7]),
    Row("stop", "world"),
    Row("stop", ["x", "world"]),
    Row("seed", 7),
    Row("n", 2),
    Row("response_format", {"type": "json_object"}),
    Row("response_format", SCHEMA),
    Row("structured_outputs", {"choice": ["a", "b"]}),
    Row("guided_json", {"type": "object"}),
    Row("guided_regex", "a+"),
    Row("guided_choice", ["a", "b"]),
    Row("guided_grammar", 'root ::= "a"'),
    Row("priority", 3),
    Row("timeout", 9.0),
    Row("cache_salt", "s"),
    Row("stream", True),
    Row("stream_options", {"include_usage": True}, beside={"stream": True}),
    Row(
        "stream_options",
        {"include_usage": True, "continuous_usage_stats": True},
        beside={"stream": True, "stream_options": {"include_usage": True}},
    ),
    Row("response_format", {"type": "regex", "regex": "a"}, "refused"),
    Row("chat_template", "{{ x }}", "refused"),
    Row("custom_logit_processor", "x", "refused"),
    Row("ebnf", "x", "refused"),
    Row("include_stop_str_in_output", True, "refused"),
    Row("prompt_logprobs", 1, "refused"),
    Row("regex", "a+", "refused"),
    Row("service_tier", "flex", "refused"),
    Row("service_tier", "priority", "refused"),
    Row("skip_special_tokens", False, "refused"),
    Row("structural_tag", {}, "refused"),
    Row("use_beam_search", True, "refused"),
    Row("model", "other", "refused"),
    Row("service_tier", "auto", "idle"),
    Row("user", "ann", "idle"),
    Row("metadata", {"a": "b"}, "idle"),
    Row("safety_identifier", "x", "idle"),
    Row("prompt_cache_key", "k", "idle"),
    Row("prompt_cache_retention", "24h", "idle"),
    Row("an_unknown_vendors", {"field": 1}, "idle"),
)

CHAT = (
    *SAMPLING,
    Row("messages", [USER, THINKER, USER]),
    Row("messages", [{"role": "developer", "content": "x"}, USER]),
    Row("messages", [USER | {"content": [{"type": "text", "text": "ho"}]}]),
    Row(
        "messages", [USER | {"content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], "refused"
    ),
    Row("messages", [USER | {"name": "ann", "cache_control": {"type": "ephemeral"}}], "idle"),
    Row(
        "messages",
        [USER | {"content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}],
        "idle",
    ),
    Row("max_completion_tokens", 7),
    Row("explain_cache", True),
    Row("logprobs", True),
    Row("top_logprobs", 2, beside={"logprobs": True}),
    Row("chat_template_kwargs", {"enable_thinking": False}),
    Row("chat_template_kwargs", {"clear_thinking": False}, beside={"messages": [USER, THINKER, USER]}),
    Row("chat_template_kwargs", {"enable_thinkin": False}, "refused"),
    Row("add_generation_prompt", False),
    Row("continue_final_message", True, beside={"messages": [USER, THINKER]}),
    Row("reasoning", {"enabled": False}),
    Row("reasoning", {"effort": "none"}),
    Row("reasoning_effort", "none"),
    Row("reasoning_effort", "extreme", "refused"),
    Row("thinking", {"type": "disabled"}),
    Row("thinking_token_budget", 5),
    Row("tools", [TOOL]),
    Row("tools", [TOOL], beside={"tool_choice": "auto"}),
    Row("tools", [{"type": "custom", "custom": {"name": "x"}}], "refused"),
    Row("tools", [TOOL | {"cache_control": {"type": "ephemeral"}}], "idle", beside={"tools": [TOOL]}),
    *(
        Row("tool_choice", choice, beside={"tools": [TOOL]}, answer="hm</think>" + CALL)
        for choice in ("none", "required", {"type": "function", "function": {"name": "look"}})
    ),
    Row("parallel_tool_calls", False, beside={"tools": [TOOL]}, answer="hm</think>" + CALL * 2),
    Row("audio", {"voice": "x"}, "refused"),
    Row("echo", True, "refused"),
    Row("function_call", {"name": "f"}, "refused"),
    Row("functions", [{"name": "f"}], "refused"),
    Row("modalities", ["audio"], "refused"),
    Row("prediction", {"type": "content", "content": "x"}, "refused"),
    Row("store", True, "refused"),
    Row("store", False, "idle"),
    Row("verbosity", "low", "refused"),
    Row("web_search_options", {}, "refused"),
)

COMPLETION = (
    *SAMPLING,
    Row("prompt", "other"),
    Row("prompt", ["a", "b"]),
    Row("prompt", [104, 105, 106]),
    Row("echo", True),
    Row("logprobs", 2),
    Row("logprobs", 2, beside={"echo": True}),
    Row("max_tokens", 0),
    Row("best_of", 2, "refused"),
    Row("suffix", "x", "refused"),
    Row("truncate_prompt_tokens", 5, "refused"),
    Row("add_special_tokens", False, "idle"),  # this tokenizer, as GLM's, adds none
)


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    directory = tmp_path_factory.mktemp("glm")
    write_tokenizer(directory, glm_template.TEMPLATE, glm_template.SPECIAL_TOKENS, glm_template.TEXT_TOKENS)
    return ServedModel(
        name="tiny",
        tokenizer=Tokenizer(directory),
        max_model_len=4096,
        stop_token_ids=(1,),
        sampling_defaults=SamplingDefaults(),
        created=1,
        fingerprint="fp_tiny",
    )


def _send(glm: ServedModel, path: str, body: dict[str, Any], answer: str) -> tuple[httpx.Response, list[Any]]:
    """The response, and what the engine was asked."""
    engine = ScriptedEngine(glm.tokenizer.encode(answer))
    app = create_app(engine, glm, ServerConfig())

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, json=body)

    response = asyncio.run(asyncio.wait_for(send(), 60))
    asked = [msgspec.to_builtins(request) for request in engine.requests]
    for request in asked:
        request["request_id"] = ""
        request["deadline"] = request["deadline"] is not None
    return response, asked


def _told(response: httpx.Response) -> object:
    """What a client gets, without what differs each time."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("id", "created", "timings")}
        return [plain(one) for one in value] if isinstance(value, list) else value

    if response.headers["content-type"] == "application/json":
        return plain(response.json())
    events = response.text.removesuffix("data: [DONE]\n\n").split("\n\n")
    return [plain(json.loads(event.removeprefix("data: "))) for event in events if event]


def _check(glm: ServedModel, path: str, body: dict[str, Any], row: Row) -> None:
    body = body | dict(row.beside)
    response, asked = _send(glm, path, body | {row.name: row.value}, row.answer)
    if row.verdict == "refused":
        assert response.status_code in (400, 404) and asked == []
        assert response.json()["error"]["param"].startswith(row.name)
        return
    assert response.status_code == 200, response.text
    plain = _send(glm, path, body, row.answer)
    is_equal = (_told(response), asked) == (_told(plain[0]), plain[1])
    assert is_equal == (row.verdict == "idle")


@pytest.mark.parametrize("row", CHAT, ids=str)
def test_chat_completions(glm: ServedModel, row: Row) -> None:
    _check(glm, "/v1/chat/completions", {"model": "tiny", "messages": [USER]}, row)


@pytest.mark.parametrize("row", COMPLETION, ids=str)
def test_completions(glm: ServedModel, row: Row) -> None:
    _check(glm, "/v1/completions", {"model": "tiny", "prompt": "hi"}, row)


@pytest.mark.parametrize(("kind", "rows"), [(ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETION)])
def test_no_field_is_left_out(kind: type[msgspec.Struct], rows: tuple[Row, ...]) -> None:
    assert set(kind.__struct_fields__) <= {row.name for row in rows}


ANSWER = "hm</think>hello"


def test_every_response_has_what_clients_read(glm: ServedModel) -> None:
    body = {"model": "tiny", "messages": [USER]}
    response, _ = _send(glm, "/v1/chat/completions", body, ANSWER)
    answer = response.json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}  # its end tag too
    assert answer["usage"]["estimated_cost"] > 0
    assert answer["system_fingerprint"] == "fp_tiny"
    assert answer["timings"]["predicted_n"] == answer["usage"]["completion_tokens"]
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    message = choice["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("hm", "hm", "hello")
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/nothing"])
def test_every_error_has_openais_shape(glm: ServedModel, path: str) -> None:
    response, _ = _send(glm, path, {"model": 5}, ANSWER)
    error = response.json()["error"]
    assert response.status_code == (404 if path == "/v1/nothing" else 400)
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
