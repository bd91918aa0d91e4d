from __future__ import annotations

from typing import Any

import pytest

from nybble.server.chat.schema_kinds import SchemaKinds

ROOT = {
    "$defs": {
        "City": {"type": "string"},
        "Loop": {"$ref": "#/$defs/Loop"},
        "Tree": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/Tree"}}]},
        "a/b~c": {"type": "boolean"},
        "List": [{"type": "integer"}],
    },
    "properties": {"a": {"type": "string"}},
    "additionalProperties": {"type": "integer"},
}
NUMBER = {"number", "integer"}


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({}, None),
        (True, None),
        ("x", None),
        (None, None),
        ({"type": "string"}, {"string"}),
        ({"type": "number"}, NUMBER),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"type": 3}, None),
        ({"type": []}, None),
        ({"enum": ["a", 1, None, 1.5, True]}, {"string", "integer", "null", "number", "boolean"}),
        ({"type": "string", "enum": ["a", None]}, {"string"}),
        ({"const": {"a": 1}}, {"object"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"string", "null"}),
        ({"oneOf": [{"type": "integer"}, {"enum": [[]]}]}, {"integer", "array"}),
        ({"anyOf": [{"type": "string"}, {}]}, None),
        ({"allOf": [{"type": ["string", "null"]}, {"type": "string"}, {"minLength": 1}]}, {"string"}),
        ({"allOf": [{"type": "number"}, {"type": "integer"}]}, {"integer"}),
        ({"type": "string", "nullable": True}, {"string", "null"}),
        ({"properties": {}}, {"object"}),
        ({"$ref": "#/$defs/City"}, {"string"}),
        ({"$ref": "#/$defs/Loop"}, None),
        ({"$ref": "#/$defs/Tree"}, {"null", "array"}),
        ({"$ref": "#/$defs/a~1b~0c"}, {"boolean"}),
        ({"$ref": "#/%24defs/City"}, {"string"}),
        ({"$ref": "#/$defs/List/0"}, {"integer"}),
        ({"$ref": "#/$defs/List/7"}, None),
        ({"$ref": "#/$defs/None/x"}, None),
        ({"$ref": "http://elsewhere/x"}, None),
        ({"$ref": 3, "type": "null"}, {"null"}),
    ],
)
def test_kinds(schema: Any, wanted: set[str] | None) -> None:
    assert SchemaKinds(ROOT).of(schema) == wanted


@pytest.mark.parametrize(
    ("root", "name", "wanted"),
    [
        (ROOT, "a", {"type": "string"}),
        (ROOT, "b", {"type": "integer"}),
        ({"$ref": "#/$defs/O", "$defs": {"O": {"properties": {"a": {}}}}}, "a", {}),
        (
            {"allOf": [{"properties": {"b": {}}}, {"properties": {"a": {"type": "null"}}}]},
            "a",
            {"type": "null"},
        ),
        ({"anyOf": [ROOT, {"properties": {"a": {}}}]}, "a", {"anyOf": [{"type": "string"}, {}]}),
        ({"anyOf": [{"additionalProperties": {}}, {"properties": {"b": {}}}]}, "a", {}),
        ({"$ref": "#", "additionalProperties": False}, "a", False),
        ({"$ref": "#/nowhere"}, "a", None),
        ({"properties": []}, "a", None),
        (None, "a", None),
        ([], "a", None),
    ],
)
def test_properties(root: Any, name: str, wanted: Any) -> None:
    assert SchemaKinds(root).property(name) == wanted


def test_references_that_double_cost_no_more_than_the_schema() -> None:
    count = 200
    definitions: dict[str, Any] = {
        str(n): {"anyOf": [{"$ref": f"#/$defs/{n + 1}"}, {"$ref": f"#/$defs/{n + 1}"}]} for n in range(count)
    }
    schema = {"$defs": definitions | {str(count): {"type": "string"}}}
    assert SchemaKinds(schema).of({"$ref": f"#/$defs/{count - 5}"}) == {"string"}
    SchemaKinds(schema).of({"$ref": "#/$defs/0"})  # deeper than is looked: 2 ** 64 steps if done twice each
