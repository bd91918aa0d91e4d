"""Which grammar a request asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nybble.engine.grammar.grammar import Grammar, Thought
from nybble.engine.tokenizer import Tokenizer
from nybble.server.chat.chat_request import parse_chat_request
from nybble.server.errors import BadRequestError
from nybble.server.requests.grammar_request import asked_grammar, coming_thought, open_thought

THOUGHT = Thought(end_token_id=7)
SCHEMA = {"type": "array"}


def asked(**fields: Any) -> Grammar | None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]} | fields
    return asked_grammar(parse_chat_request(json.dumps(body).encode()), THOUGHT)


def of(kind: Any, text: str, parameter: str, is_lenient: bool = False) -> Grammar:
    return Grammar(kind=kind, text=text, parameter=parameter, is_lenient=is_lenient, thought=THOUGHT)


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a"} | fields}


OBJECT, LIST = '{"type": "object"}', '{"type": "array"}'


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"response_format": {"type": "json_object"}}, of("json_schema", OBJECT, "response_format")),
        (
            {"response_format": json_schema(schema=SCHEMA)},
            of("json_schema", LIST, "response_format.json_schema.schema", is_lenient=True),
        ),
        (
            {"response_format": json_schema(schema=SCHEMA, strict=True)},
            of("json_schema", LIST, "response_format.json_schema.schema"),
        ),
        ({"guided_json": SCHEMA}, of("json_schema", LIST, "guided_json")),
        ({"guided_json": "{}"}, of("json_schema", "{}", "guided_json")),
        ({"guided_regex": "a+"}, of("regex", "a+", "guided_regex")),
        ({"guided_grammar": "start: /a/"}, of("lark", "start: /a/", "guided_grammar")),
        ({"guided_choice": ["a", 'b"ü']}, of("lark", 'start: "a" | "b\\"ü"', "guided_choice")),
        ({"structured_outputs": {"regex": "a"}}, of("regex", "a", "structured_outputs.regex")),
        (
            {"structured_outputs": {"json_object": True}},
            of("json_schema", OBJECT, "structured_outputs.json_object"),
        ),
    ],
)
def test_the_grammar_that_is_asked_for(fields: dict[str, Any], expected: Grammar | None) -> None:
    assert asked(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": json_schema(schema=[])}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(name="")}, "response_format.json_schema.name"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_json": SCHEMA}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        asked(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("prompt", "may_begin_with_thought", "is_open"),
    [
        ("<|user|>hello<|assistant|><think>", True, True),
        ("<|user|>hello<|assistant|></think>", False, False),
        ("<|user|>hello<|assistant|><think></think>", False, False),
        ("<|user|>hello<|assistant|>", True, False),
        ("<|assistant|><think>a</think>b<|user|>hello<|assistant|>", True, False),
        ("hello", False, False),
        ("hello<think>so", True, True),
    ],
)
def test_where_a_thought_comes_first(
    tokenizer: Tokenizer, prompt: str, may_begin_with_thought: bool, is_open: bool
) -> None:
    start, end = (tokenizer.encode(tag)[0] for tag in ("<think>", "</think>"))
    token_ids = tokenizer.encode(prompt)
    opened = Thought(end_token_id=end) if is_open else None
    left_open = opened or Thought(end_token_id=end, start_token_id=start)
    assert open_thought(tokenizer, token_ids) == opened
    assert coming_thought(tokenizer, token_ids) == (left_open if may_begin_with_thought else None)
