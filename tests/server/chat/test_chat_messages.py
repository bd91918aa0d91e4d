from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nybble.server.chat.chat_messages import template_messages
from nybble.server.errors import BadRequestError
from nybble.server.requests.schemas import ChatMessage
from nybble.server.served_model import ServedModel


def _plain(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return template_messages(msgspec.convert(messages, list[ChatMessage]))


def _call(name: str = "f", arguments: Any = "{}", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | fields


def _result(content: Any, call_id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": content} | ({"tool_call_id": call_id} if call_id else {})


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "user", "content": PARTS}, {"role": "user", "content": "ab"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        (_result(PARTS, "c"), {"role": "tool", "content": "ab"}),
        (_result(None), {"role": "tool", "content": ""}),
        (
            {"role": "assistant", "reasoning": "R", "tool_calls": []},
            {"role": "assistant", "content": "", "reasoning_content": "R"},
        ),
    ],
)
def test_messages_in_the_plain(message: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert _plain(message) == [wanted]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"x": [1, "é"]}', {"x": [1, "é"]}),
        ({"x": 1}, {"x": 1}),
        ("", {}),
        (" ", {}),
        ("{}", {}),
    ],
)
def test_arguments_are_an_object(arguments: Any, wanted: dict[str, Any]) -> None:
    (message,) = _plain({"role": "assistant", "tool_calls": [_call(arguments=arguments)]})
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": wanted}}]


@pytest.mark.parametrize("arguments", ["{", '{"city": "Par', "[]", "3", "null", "[" * 100_000])
def test_arguments_that_are_none(arguments: str) -> None:
    turn = {"role": "assistant", "tool_calls": [_call(), _call(arguments=arguments)]}
    for takes_text, wanted in ((True, arguments), (False, {"arguments": arguments})):
        (message,) = template_messages(msgspec.convert([turn], list[ChatMessage]), takes_text)
        assert [call["function"]["arguments"] for call in message["tool_calls"]] == [{}, wanted]


def test_only_an_assistant_calls() -> None:
    with pytest.raises(BadRequestError) as caught:
        _plain({"role": "user", "content": "x", "tool_calls": [_call()]})
    assert caught.value.param == "messages[0].tool_calls"


def test_results_come_in_the_order_of_their_calls() -> None:
    turn = {"role": "assistant", "tool_calls": [_call(id="a"), _call(id="b"), _call(id="c")]}
    first = [turn, _result("C", "c"), _result("A", "a"), _result("B", "b")]
    again = [{"role": "user", "content": "u"}, turn, _result("?"), _result("B", "b"), _result("!", "x")]
    assert [message["content"] for message in _plain(*first, *again)] == [
        *("", "A", "B", "C"),
        *("u", "", "B", "?", "!"),
    ]


def test_calls_and_results_as_glm_reads_them(glm: ServedModel) -> None:
    messages = _plain(
        {"role": "user", "content": "U"},
        {
            "role": "assistant",
            "reasoning_content": "R",
            "tool_calls": [_call("f", '{"city": "Paris", "l": ["a", 1], "none": null}'), _call("g")],
        },
        _result("T1"),
        _result("T2"),
    )
    assert glm.tokenizer.render_chat(messages) == (
        "[gMASK]<sop><|user|>U<|assistant|><think>R</think><tool_call>f<arg_key>city</arg_key>"
        '<arg_value>Paris</arg_value><arg_key>l</arg_key><arg_value>["a", 1]</arg_value>'
        "<arg_key>none</arg_key><arg_value>null</arg_value></tool_call><tool_call>g</tool_call><|observation|><tool_response>T1"
        "</tool_response><tool_response>T2</tool_response><|assistant|><think>"
    )
