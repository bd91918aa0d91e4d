from __future__ import annotations

import json
from typing import Any

import pytest

from nybble.server.chat.chat_request import parse_chat_request, prepare_chat_request
from nybble.server.errors import APIError, BadRequestError, NotFoundError
from nybble.server.requests.tokenize_request import detokenize, tokenize
from nybble.server.served_model import ServedModel

USER = {"role": "user", "content": "hi"}


def _body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_a_prompt(model: ServedModel, end_id: int) -> None:
    answer = tokenize(_body(model="tiny", prompt="a hello<|end|>"), model)
    assert answer.tokens == list(model.tokenizer.encode("a hello<|end|>"))
    assert (answer.count, answer.max_model_len, answer.token_strs) == (len(answer.tokens), 64, None)
    assert answer.tokens[-1] == end_id


def test_token_strings(model: ServedModel) -> None:
    answer = tokenize(_body(prompt="hello€", return_token_strs=True), model)
    assert answer.token_strs == ["hello", "\ufffd", "\ufffd", "\ufffd"]


@pytest.mark.parametrize("begun", [None, True, False])
def test_messages(model: ServedModel, begun: bool | None) -> None:
    answer = tokenize(_body(messages=[USER], add_generation_prompt=begun), model)
    wanted = "<|user|>hi" if begun is False else "<|user|>hi<|assistant|>"
    assert answer.tokens == list(model.tokenizer.encode(wanted))


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_generation_prompt": False},
        {"messages": [USER, {"role": "assistant", "content": "so"}], "continue_final_message": True},
    ],
)
def test_the_tokens_of_a_chat_are_those_that_run(glm: ServedModel, fields: dict[str, Any]) -> None:
    body = _body(**{"model": "tiny", "messages": [USER]} | fields)
    asked = prepare_chat_request(parse_chat_request(body), glm)
    assert tuple(tokenize(body, glm).tokens) == asked.prompt_token_ids


@pytest.mark.parametrize("text", ["", "a hello", "naïve 😀<|end|>"])
def test_there_and_back(model: ServedModel, text: str) -> None:
    tokens = tokenize(_body(prompt=text), model).tokens
    assert detokenize(_body(tokens=tokens, model="tiny"), model).prompt == text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"messages": [USER], "tools": [TOOL]}, "tools"),
        ({"messages": [USER], "tools": [{"type": "x"}]}, "tools[0].type"),
        ({"prompt": "a", "messages": [USER]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [USER], "chat_template": "{{ x }}"}, "chat_template"),
        ({"messages": [USER], "continue_final_message": True}, "continue_final_message"),
        ({"messages": [USER], "chat_template_kwargs": {"x": True}}, "chat_template_kwargs"),
        ({"prompt": "\ud800"}, None),
    ],
)
def test_a_bad_field_is_named(model: ServedModel, fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(BadRequestError) as caught:
        tokenize(_body(**fields), model)
    assert caught.value.param == param


@pytest.mark.parametrize("tokens", [[1_000_000], [5, 275]])
def test_a_token_that_is_none(model: ServedModel, tokens: list[int]) -> None:
    with pytest.raises(BadRequestError, match=f"token id {tokens[-1]}") as caught:
        detokenize(_body(tokens=tokens), model)
    assert caught.value.param == "tokens"


@pytest.mark.parametrize("function", [tokenize, detokenize])
def test_another_model(model: ServedModel, function: Any) -> None:
    with pytest.raises(NotFoundError, match="'huge'"):
        function(_body(model="huge", prompt="a", tokens=[]), model)


@pytest.mark.parametrize("function", [tokenize, detokenize])
@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_request(model: ServedModel, function: Any, body: bytes) -> None:
    with pytest.raises(APIError):
        function(body, model)
