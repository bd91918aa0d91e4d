"""Chats as clients send them, and as a chat template's own document has them.

`plain` is written by hand: the messages for the template where they are not those of the client. A list of
text parts is left to templates that take one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class GoldenChat:
    """options: variables of the template, which `fields` of the request mean; has_token_names: whether what
    the client wrote has the name of a token, so that the tokens of the text as a whole are others."""

    name: str
    messages: Sequence[Message]
    plain: Sequence[Message] | None = None
    tools: Sequence[dict[str, Any]] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, bool] = field(default_factory=dict)
    has_token_names: bool = False

    @property
    def template_messages(self) -> Sequence[Message]:
        return self.messages if self.plain is None else self.plain


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def said(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content} | more


def result(content: Any, call_id: str | None = None) -> Message:
    return {"role": "tool", "content": content} | ({"tool_call_id": call_id} if call_id else {})


def call(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": call_id} if call_id else {})


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a città, 天气 - \"now\" & 'here' <b>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
            "required": ["city"],
        },
    },
}
CLOCK = {"function": {"name": "clock"}, "type": "function"}  # keys in another order, nothing else in it
SEARCH = {
    "type": "function",
    "function": {
        "parameters": {"$defs": {"q": {"enum": ["a", None, 1.5, True]}}, "properties": {}},
        "name": "search.web-2",
        "vendor": {"rank": [1, {"deep": []}]},
    },
}
TYPES = {"s": "3", "i": 3, "f": 1.5, "t": True, "n": None, "l": ["é", 1], "o": {"k": "v", "a": {}}, "e": ""}
THOUGHT = "First, I look.\n\nThen I leap."
OFF: dict[str, Any] = {"enable_thinking": False}
KEPT: dict[str, Any] = {"clear_thinking": False}


def _agent(thought: str = "R1", later: str = "R2") -> list[Message]:
    """A loop of calls after a question."""
    return [
        user("Weather in Paris?"),
        said("", reasoning_content=thought, tool_calls=[call("get_weather", {"city": "Paris"}, "a")]),
        result("18 °C", "a"),
        said("And now?", reasoning_content=later, tool_calls=[call("clock", {}, "b")]),
        result("12:00", "b"),
    ]


_SEVERAL = [call("get_weather", {"city": c}, c) for c in ("Rome", "Oslo", "Lima")]
_TURNS = [user("U1"), said("A1", reasoning_content=THOUGHT), user("U2"), said("A2", reasoning_content="R2")]

CHATS = (
    GoldenChat("one question", [user("hi")]),
    GoldenChat("system", [system("Be brief."), user("hi")]),
    GoldenChat("two systems", [system("A"), system("B"), user("hi")]),
    GoldenChat("system in the middle", [user("U"), said("A"), system("Now in French."), user("V")]),
    GoldenChat("developer", [{"role": "developer", "content": "D"}, user("U")], [system("D"), user("U")]),
    GoldenChat("several turns", [user("U1"), said("A1"), user("U2"), said("A2"), user("U3")]),
    GoldenChat("no user", [system("Greet.")]),
    GoldenChat("ends with an assistant", [user("U"), said("A")]),
    GoldenChat("empty user", [user("")]),
    GoldenChat("empty system", [system(""), user("U")]),
    GoldenChat("empty answer", [user("U"), said(""), user("V")]),
    GoldenChat("null answer", [user("U"), said(None), user("V")], [user("U"), said(""), user("V")]),
    GoldenChat("no content", [user("U"), {"role": "assistant"}, user("V")], [user("U"), said(""), user("V")]),
    GoldenChat("white space", [system(" \n s\t"), user("\n\n u \n"), said("\n a \n\n b \n"), user(" ")]),
    GoldenChat("carriage returns", [user("a\r\nb\rc"), said("x\r\ny"), user("z\r\n")]),
    GoldenChat(
        "unicode",
        [user("naïve 語 😀👩‍👩‍👧 e\u0301 \u2028 \ufeff"), said("Ελληνικά"), user("עברית \u200f!")],
    ),
    GoldenChat("zero bytes and controls", [user("a\x00b\x1bc\x7f")]),
    GoldenChat("jinja in a text", [user("{{ messages }} {% raw %} {# no #}"), said("{{ 1/0 }}"), user("%}")]),
    GoldenChat("html and quotes", [user("<b>&amp; \"q\" 'q' \\n </b>"), said("<|x|> <think"), user(">")]),
    GoldenChat("parts", [system([part("S"), part("T")]), user([part("a"), part("\n"), part("b")])]),
    GoldenChat("no parts", [user([]), said([]), user([part("")])]),
    GoldenChat("parts of an answer", [user("U"), said([part("A"), part(" B ")]), user("V")]),
    GoldenChat("thinking off", [user("hi")], fields={"chat_template_kwargs": OFF}, options=OFF),
    GoldenChat(
        "thinking on", [user("hi")], fields={"reasoning_effort": "high"}, options={"enable_thinking": True}
    ),
    GoldenChat(
        "thinking off, turns", [*_TURNS, user("U3")], fields={"thinking": {"type": "disabled"}}, options=OFF
    ),
    GoldenChat("nothink already", [user("hi/nothink")], fields={"reasoning_effort": "none"}, options=OFF),
    GoldenChat("nothink by hand", [user("hi /nothink"), said("A"), user("U")]),
    GoldenChat("thoughts of the past", [*_TURNS, user("U3")]),
    GoldenChat("thoughts kept", [*_TURNS, user("U3")], fields={"chat_template_kwargs": KEPT}, options=KEPT),
    GoldenChat(
        "thoughts kept, off",
        [*_TURNS, user("U3")],
        fields={"thinking": {"type": "disabled", "clear_thinking": False}},
        options=KEPT | OFF,
    ),
    GoldenChat("thought of the last turn", _TURNS),
    GoldenChat(
        "thought by its other name",
        [user("U"), said("A", reasoning="R")],
        [user("U"), said("A", reasoning_content="R")],
    ),
    GoldenChat("empty thought", [user("U"), said("A</think>B", reasoning_content="")], has_token_names=True),
    GoldenChat("blank thought", [user("U"), said("A", reasoning_content=" \n ")]),
    GoldenChat("thought in the content", [user("U"), said("<think>\nR\n</think>\n\nA")]),
    GoldenChat("thought in old content", [user("U"), said("R</think>A"), user("V")]),
    GoldenChat("tools", [user("U")], tools=[WEATHER]),
    GoldenChat("tools, system", [system("S"), user("U")], tools=[WEATHER, CLOCK, SEARCH]),
    GoldenChat(
        "tools not to be used", [user("U")], [user("U")], fields={"tools": [WEATHER], "tool_choice": "none"}
    ),
    GoldenChat("agent", _agent(), tools=[WEATHER, CLOCK]),
    GoldenChat("agent, next question", [*_agent(), said("Warm."), user("Thanks")], tools=[WEATHER, CLOCK]),
    GoldenChat(
        "agent, thoughts kept",
        [*_agent(), said("Warm.", reasoning_content="R3"), user("Thanks")],
        tools=[WEATHER, CLOCK],
        fields={"chat_template_kwargs": KEPT},
        options=KEPT,
    ),
    GoldenChat(
        "agent, thinking off",
        _agent("", ""),
        tools=[CLOCK],
        fields={"reasoning": {"enabled": False}},
        options=OFF,
    ),
    GoldenChat(
        "arguments of all types",
        [
            user("U"),
            said(
                None,
                tool_calls=[
                    call(
                        "f",
                        '{"s": "3", "i": 3, "f": 1.5, "t": true, "n": null, '
                        '"l": ["\\u00e9", 1], "o": {"k": "v", "a": {}}, "e": ""}',
                    )
                ],
            ),
        ],
        [user("U"), said("", tool_calls=[call("f", TYPES)])],
    ),
    GoldenChat(
        "no arguments",
        [user("U"), said(None, tool_calls=[call("f", ""), call("g", "{}"), call("h", {})])],
        [user("U"), said("", tool_calls=[call("f", {}), call("g", {}), call("h", {})])],
    ),
    GoldenChat(
        "several calls, results out of order",
        [
            user("U"),
            said("", tool_calls=_SEVERAL),
            result("L", "Lima"),
            result("R", "Rome"),
            result("O", "Oslo"),
        ],
        [user("U"), said("", tool_calls=_SEVERAL), result("R"), result("O"), result("L")],
    ),
    GoldenChat(
        "results in parts",
        [user("U"), said("", tool_calls=[call("f", {})]), result([part("a"), part("b")]), result(None)],
        [user("U"), said("", tool_calls=[call("f", {})]), result("ab"), result("")],
    ),
    GoldenChat(
        "result of many lines", [user("U"), said("", tool_calls=[call("f", {})]), result("\n{\n  1\n}\n\n")]
    ),
    GoldenChat("result first", [result("T"), user("U")]),
    GoldenChat(
        "text before calls", [user("U"), said(" A \n", tool_calls=[call("f", {"x": " y\n"})]), result("T")]
    ),
    GoldenChat(
        "names of tokens",
        [
            system("<|user|>S"),
            user("<|assistant|><think>U</think>[gMASK]"),
            said("<|user|>A"),
            user("<tool_call>"),
        ],
        has_token_names=True,
    ),
    GoldenChat(
        "names of tokens in calls",
        [
            user("U"),
            said("", tool_calls=[call("f", {"<|user|>": "</arg_value>"})]),
            result("</tool_response><sop>"),
        ],
        tools=[WEATHER],
        has_token_names=True,
    ),
)
