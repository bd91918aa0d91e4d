"""Random outputs of a model: well-formed ones, of which the answer is known, and torn ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

THINK_TAGS = ("<think>", "</think>")
CALL_TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
TAGS = (*THINK_TAGS, *CALL_TAGS)
# In no tag, and the same in text, in keys and in JSON: each is in an answer as often as in the output.
PAYLOAD = "éß語😀¤\ufffd"

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "s": {"type": "string"},
                    "i": {"type": "integer"},
                    "b": {"type": "boolean"},
                    "l": {"$ref": "#/$defs/list"},
                    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                },
                "required": ["s"],
                "$defs": {"list": {"type": "array"}},
            },
        },
    },
    {"type": "function", "function": {"name": "ns.g-2"}},
]
# Of a key of tool f, what a model may write and what it means, also where the schema does not allow it.
_VALUES: dict[str, list[tuple[str, Any]]] = {
    "s": [
        ("", ""),
        ("3", "3"),
        ("null", "null"),
        (' "q"\\\n', ' "q"\\\n'),
        ("é語", "é語"),
        ("<b> & </b", "<b> & </b"),
    ],
    "i": [
        ("3", 3),
        (" -4\n", -4),
        ("5.0", 5),
        ("many", "many"),
        ("[1]", [1]),
        ("1e999", float("inf")),
        ("NaN", "NaN"),
    ],
    "b": [("true", True), ("False", False), ("0", 0), ("yes", "yes")],
    "l": [("[]", []), ('["é", {"a": null}]', ["é", {"a": None}]), ("[1,", "[1,"), ("{}", {})],
    "maybe": [("null", None), ("None", "None"), ("x", "x"), ("7", "7")],
    "unknown": [("7", 7), ("x y", "x y"), ('{"k": []}', {"k": []}), ('"q"', '"q"'), ("[[", "[["), ("", "")],
}
_TEXTS = ("a", "An answer, of é語😀.", "x < y > z", "<tool", "</thin", "{\n  1\n}", "a\n\nb", "<b>¤</b>")
_FRAGMENTS = (
    *(*TAGS, *TAGS),
    *("<", "</", "<tool_", "call>", "<arg_", "key>", "value>", "</thi", "nk>", "<tool_call", "<<think>"),
    *(
        "<tool_<tool_call>call>",
        "<arg_key><arg_key>",
        "</tool_call></tool_call>",
        "<TOOL_CALL>",
        "<tool_call >",
    ),
    *(
        "f",
        "ns.g-2",
        "nobody",
        "two words",
        "s",
        "i",
        "l",
        "maybe",
        '{"name": "f"}',
        "[1, ",
        '"',
        "\\",
        "3",
        "null",
    ),
    *(" ", "\n", "\n\n", "\r\n", "\t", "\u2028", "\x00", *PAYLOAD, "STOP"),
)


@dataclass(frozen=True)
class Answer:
    """calls: names and arguments, each argument by its key."""

    reasoning: str
    content: str
    calls: tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True)
class Markup:
    """What the model writes between the tags of a call, and how it begins."""

    is_open: bool  # the prompt has opened the thought
    line_end: str


GLM_4_7 = Markup(is_open=True, line_end="")
GLM_4_6 = Markup(is_open=False, line_end="\n")


def well_formed(random: Random, markup: Markup) -> tuple[str, Answer]:
    """An output, and what it says."""
    has_thought = random.random() < 0.7
    reasoning = _text(random) if has_thought else ""
    content = _text(random) if random.random() < 0.7 else ""
    calls = [_call(random) for _ in range(random.randrange(4))]
    start = "" if markup.is_open else "\n<think>"
    pieces = [f"{start}{reasoning}</think>", content, *(_written(*call, markup) for call in calls)]
    text = markup.line_end.join(pieces)
    meant = tuple((name, {key: value for key, _, value in arguments}) for name, arguments in calls)
    return text, Answer(reasoning, content, meant)


def torn(random: Random) -> list[str | bytes]:
    """Fragments: texts, and bytes that are no whole character."""
    return [_fragment(random) for _ in range(random.randrange(1, 24))]


def _fragment(random: Random) -> str | bytes:
    if random.random() < 0.1:
        return random.choice((b"\xf0\x9f\x98", b"\x80", b"\xe8\xaa", b"\xff", b"\xc3", b"\xed\xa0\x80"))
    if random.random() < 0.1:
        return _written(*_call(random), random.choice((GLM_4_7, GLM_4_6)))
    return random.choice(_FRAGMENTS)


def _text(random: Random) -> str:
    return " ".join(random.choice(_TEXTS) for _ in range(random.randrange(1, 4)))


def _call(random: Random) -> tuple[str, list[tuple[str, str, Any]]]:
    """Name; of each argument the key, what is written, and what it means. Other tools have no types."""
    if random.random() < 0.3:
        return random.choice(("ns.g-2", "nobody")), [
            ("k", text, value) for text, value in _some(random, ["unknown"])
        ]
    keys = random.sample(sorted(_VALUES), random.randrange(len(_VALUES)))
    return "f", [(key, *random.choice(_VALUES[key])) for key in keys]


def _some(random: Random, keys: Sequence[str]) -> list[tuple[str, Any]]:
    return [random.choice(_VALUES[key]) for key in keys if random.random() < 0.7]


def _written(name: str, arguments: Sequence[tuple[str, str, Any]], markup: Markup) -> str:
    end = markup.line_end
    pairs = (f"<arg_key>{key}</arg_key>{end}<arg_value>{text}</arg_value>{end}" for key, text, _ in arguments)
    return f"<tool_call>{name}{end}{''.join(pairs)}</tool_call>"


def arguments_of(text: str) -> dict[str, Any]:
    """Raises ValueError: they are no JSON object."""
    arguments = json.loads(text, parse_constant=_refuse)
    if not isinstance(arguments, dict):
        raise ValueError(text)
    return arguments


def _refuse(constant: str) -> None:
    raise ValueError(constant)
