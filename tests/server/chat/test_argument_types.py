from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.chat.argument_types import ArgumentType, ArgumentTypes, string_piece


@pytest.mark.parametrize(
    ("schema", "text", "wanted"),
    [
        ({"type": "string"}, " 3 ", " 3 "),
        ({"type": "string"}, '"a"', '"a"'),
        ({"type": "string"}, "", ""),
        ({"type": "integer"}, " 3\n", 3),
        ({"type": "integer"}, "3.0", 3),
        ({"type": "integer"}, '"3"', 3),
        ({"type": "integer"}, "3.5", 3.5),
        ({"type": "integer"}, "three", "three"),
        ({"type": "integer"}, "", ""),
        ({"type": "number"}, "3", 3),
        ({"type": "number"}, "3.25", 3.25),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "-Infinity", "-Infinity"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "null"}, "None", None),
        ({"type": "array"}, '["a", 1]', ["a", 1]),
        ({"type": "object"}, '{"a": {"b": null}}', {"a": {"b": None}}),
        ({"type": "object"}, "{'a': 1}", "{'a': 1}"),
        ({"type": "object"}, "[1]", [1]),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "None", "None"),
        ({"type": ["string", "integer"]}, "3", 3),
        ({"type": ["string", "integer"]}, "3.5", "3.5"),
        ({"type": ["string", "boolean"]}, "True", "True"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({}, "3", 3),
        ({}, "[1, 2]", [1, 2]),
        ({}, "some text", "some text"),
        ({}, '"a"', '"a"'),
        (None, "true", True),
    ],
)
def test_a_value_by_its_schema(schema: Any, text: str, wanted: Any) -> None:
    types = ArgumentTypes({"properties": {"x": schema}})
    value = json.loads(types.of("x").to_json(text))
    assert (value, type(value)) == (wanted, type(wanted))


_schemas = st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object"])
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(kinds=st.none() | st.frozensets(_schemas, min_size=1), text=st.text())
def test_any_text_is_some_json(kinds: frozenset[str] | None, text: str) -> None:
    json.loads(ArgumentType(kinds).to_json(text))


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, "1e999", '"\\ud800"'])
def test_extreme_texts(text: str) -> None:
    for kinds in (None, frozenset({"integer"}), frozenset({"array"})):
        assert ArgumentType(kinds).to_json(text)


@given(value=_values)
def test_what_a_template_writes_is_read_back(value: Any) -> None:
    """A template writes a string as it is and anything else as JSON."""
    kind = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    schema = {"type": kind.get(type(value), "null")}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    read = json.loads(ArgumentTypes({"properties": {"x": schema}}).of("x").to_json(text))
    assert read == value and type(read) is type(value)


@given(pieces=st.lists(st.text()))
def test_a_string_in_pieces(pieces: list[str]) -> None:
    assert json.loads(f'"{"".join(map(string_piece, pieces))}"') == "".join(pieces)


@pytest.mark.parametrize(
    ("schema", "text", "wanted"),
    [
        ({"type": "integer"}, " 12", "12"),
        ({"type": "array"}, '["a", 1', '["a", 1'),
        ({"type": ["array", "string"]}, '["a', '["a'),
        ({"type": ["object", "string"]}, '["a', '"[\\"a'),
        ({"type": ["null", "string"]}, "nul", '"nul'),
        ({}, '{"a": ', '{"a": '),
        ({}, "two w", '"two w'),
    ],
)
def test_what_is_cut_begins_as_the_whole_would(schema: dict[str, Any], text: str, wanted: str) -> None:
    types = ArgumentTypes({"properties": {"x": schema}})
    assert types.of("x").to_cut_json(text) == wanted
