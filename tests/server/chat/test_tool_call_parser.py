from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.chat.answer_parser import AnswerParser, CallRules, Content, Piece, Reasoning
from nybble.server.chat.argument_types import ArgumentTypes
from nybble.server.chat.tool_call_parser import CALL_TAGS, CallArguments, CallStart

TYPES = ArgumentTypes(
    {
        "properties": {
            "city": {"type": "string"},
            "n": {"type": "integer"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        }
    }
)
Answer = tuple[str, str, list[tuple[str, str]]]  # reasoning, content, calls


def _answer(pieces: list[Piece]) -> Answer:
    reasoning, content, calls = "", "", list[tuple[str, str]]()
    for piece in pieces:
        match piece:
            case Reasoning(text):
                reasoning += text
            case Content(text):
                content += text
            case CallStart(name):
                calls.append((name, ""))
            case CallArguments(text):
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return reasoning, content, calls


def _read(*texts: str, is_cut: bool = False, is_open: bool = True, is_parallel: bool = True) -> Answer:
    parser = AnswerParser(True, is_open, CallRules(lambda name: TYPES, is_parallel))
    pieces = [piece for text in texts for piece in parser.feed(text)]
    return _answer(pieces + parser.finish(is_cut))


def _call(name: str, **arguments: str) -> str:
    pairs = (f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in arguments.items())
    return f"<tool_call>{name}{''.join(pairs)}</tool_call>"


PARIS = ("f", '{"city": "Paris", "n": 3}')
# Text after <think>; reasoning; content; calls.
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("R</think>A" + _call("f", city="Paris", n="3"), "R", "A", [PARIS]),
    ("R</think>A \n" + _call("f", city="Paris", n="3") + "\n", "R", "A", [PARIS]),
    ("R\n" + _call("f"), "R", "", [("f", "{}")]),
    ("</think>" + _call("f") + "\n" + _call("g", n="1"), "", "", [("f", "{}"), ("g", '{"n": 1}')]),
    # GLM-4.5 and 4.6 write line ends.
    (
        "</think>\n<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>n</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        *("", "", [PARIS]),
    ),
    ("</think>" + _call("f", city=' a"\\\n<b> '), "", "", [("f", '{"city": " a\\"\\\\\\n<b> "}')]),
    ("</think>" + _call("f", city="<tool_call></tool_call>"), *("", ""), [
        ("f", '{"city": "<tool_call></tool_call>"}')
    ]),
    ("</think>" + _call("f", maybe="null") + _call("f", maybe="x"), *("", ""), [
        ("f", '{"maybe": null}'), ("f", '{"maybe": "x"}')
    ]),
    ("</think>" + _call("f", other="[1, 2]"), "", "", [("f", '{"other": [1, 2]}')]),
    # What is no call is text.
    ("</think>a <tool_call> b", "", "a <tool_call> b", []),
    ("R <tool_call>two words</think>A", "R <tool_call>two words", "A", []),
    ("</think><tool_call></tool_call>A", "", "<tool_call></tool_call>A", []),
    ("</think><tool_call>{x}</tool_call>", "", "<tool_call>{x}</tool_call>", []),
    ("</think><tool_call>f", "", "<tool_call>f", []),
    ("</think><arg_key>A</tool_call>", "", "<arg_key>A</tool_call>", []),
    ("</think><tool_call>x y" + _call("f"), "", "<tool_call>x y", [("f", "{}")]),
    ("</think><tool_call><tool_call>f</tool_call>", "", "<tool_call>", [("f", "{}")]),
    # Text within a call is content.
    ("</think>A<tool_call>f<arg_key>n</arg_key>odd<arg_value>1</arg_value> x </tool_call>B", "", "Aoddx B", [
        ("f", '{"n": 1}')
    ]),
    ("</think><tool_call>f<arg_key>n</arg_key></tool_call>", "", "<arg_key>n</arg_key>", [("f", "{}")]),
    ("</think><tool_call>f<arg_key>n</tool_call>", "", "<arg_key>n", [("f", "{}")]),
    # The model ends its turn within a call, or begins another.
    ("</think><tool_call>f<arg_key>city</arg_key><arg_value>Pa", "", "", [("f", '{"city": "Pa"}')]),
    ("</think><tool_call>f<arg_key>n</arg_key><arg_value>1", "", "", [("f", '{"n": 1}')]),
    ("</think><tool_call>f<arg_key>n</arg_key><arg_value>1</arg_value>" + _call("g"), "", "", [
        ("f", '{"n": 1}'), ("g", "{}")
    ]),
    ("</think><tool_call>f<arg_key>n</arg_key><arg_value>1</arg_value>", "", "", [("f", '{"n": 1}')]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reasoning", "content", "calls"), CASES)
def test_whole_and_at_every_split(
    text: str, reasoning: str, content: str, calls: list[tuple[str, str]]
) -> None:
    wanted = (reasoning, content, calls)
    assert _read(text) == wanted
    assert _read(*text) == wanted
    for place in range(len(text) + 1):
        assert _read(text[:place], text[place:]) == wanted
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


_parts = st.sampled_from(
    [*CALL_TAGS, "<think>", "</think>", "f", "city", "n", " ", "\n", "3", '"', "\\", "<", "é", "two words"]
)


@given(parts=st.lists(_parts), data=st.data(), is_open=st.booleans(), is_cut=st.booleans())
def test_any_text_at_any_cuts(parts: list[str], data: st.DataObject, is_open: bool, is_cut: bool) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    cut = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for is_parallel in (True, False):
        answer = _read(text, is_open=is_open, is_cut=is_cut, is_parallel=is_parallel)
        assert _read(*cut, is_open=is_open, is_cut=is_cut, is_parallel=is_parallel) == answer
        for _, arguments in answer[2] if not is_cut else answer[2][:-1]:
            assert isinstance(json.loads(arguments), dict)


@given(
    arguments=st.dictionaries(
        st.text("abc", min_size=1),
        st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<" not in text),
    )
)
def test_strings_come_back_as_they_were(arguments: dict[str, str]) -> None:
    strings = ArgumentTypes({"additionalProperties": {"type": "string"}})
    parser = AnswerParser(False, False, CallRules(lambda name: strings))
    _, _, ((name, read),) = _answer([*parser.feed(_call("f", **arguments)), *parser.finish()])
    assert (name, json.loads(read)) == ("f", arguments)


def test_what_is_cut_stays_so() -> None:
    assert _read("</think>", _call("f", city="Paris")[:-26], is_cut=True)[2] == [("f", '{"city": "Par')]
    assert _read("</think><tool_call>f<arg_key>n</arg_key><arg_value>1", is_cut=True)[2] == [("f", '{"n": 1')]
    for cut in ("<tool_call>f<arg_key>n</arg_key>", "<tool_call>f<arg_key>n"):
        assert _read("</think>", cut, is_cut=True)[2] == [("f", "")]


def test_strings_come_piece_by_piece() -> None:
    parser = AnswerParser(True, False, CallRules(lambda name: TYPES))
    seen: list[Any] = []
    for text in ("<tool_call>", "f", "<arg_key>", "city", "</arg_key>", "<arg_value>", "Pa", "ris\n"):
        seen.append(parser.feed(text))
    assert seen == [
        *([], [], [CallStart("f")], [], []),
        *([CallArguments('{"city": "')], [CallArguments("Pa")], [CallArguments("ris\\n")]),
    ]
    assert parser.feed("</arg_value>") == [CallArguments('"')]
    assert parser.feed("</tool_call>") == [CallArguments("}")]


def test_the_answer_is_over_after_one_call() -> None:
    parser = AnswerParser(True, False, CallRules(lambda name: TYPES, is_parallel=False))
    pieces = parser.feed("A" + _call("f") + _call("g") + "B")
    assert _answer(pieces) == ("", "A", [("f", "{}")])
    assert parser.is_over and parser.has_calls
    assert parser.feed("C") == [] and parser.finish() == []


def test_without_tools_markup_is_text() -> None:
    parser = AnswerParser(True, False)
    assert [*parser.feed(_call("f")), *parser.finish()] == [Content(_call("f"))]
