"""Parts of a schema, with what they refer to, mean what they mean within it."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from nybble.server.grammars.lark_text import InexpressibleError
from nybble.server.grammars.schema_references import SchemaReferences

ROOT: dict[str, Any] = {
    "$defs": {
        "a/b~c d": {"type": "integer"},
        "list": {"type": "array", "items": {"$ref": "#/$defs/list"}},
        "both": {"anyOf": [{"$ref": "#/$defs/list"}, {"$ref": "#/$defs/a~1b~0c%20d"}]},
    },
    "properties": {
        "both": {"$ref": "#/$defs/both"},
        "first": {"$ref": "#/$defs/both/anyOf/0"},
        "$ref": {"properties": {"$ref": {"$ref": "#/properties/both"}}},
        "data": {"enum": [{"$ref": "#/nowhere"}], "nullable": True},
    },
}


@pytest.mark.parametrize("name", ROOT["properties"])
@pytest.mark.parametrize(
    "value", [1, [], [[], [[]]], [1], "x", {"$ref": 1}, {"$ref": "x"}, {"$ref": "#/nowhere"}]
)
def test_a_part_alone_allows_what_it_allows_within(name: str, value: Any) -> None:
    alone = SchemaReferences(ROOT).standalone(ROOT["properties"][name])
    within = jsonschema.Draft202012Validator(
        {"properties": {name: ROOT["properties"][name]}, "$defs": ROOT["$defs"]}
    )
    if name == "$ref":
        within = jsonschema.Draft202012Validator(ROOT)
    assert jsonschema.Draft202012Validator(alone).is_valid(value) is within.is_valid({name: value})
    assert "nullable" not in alone


@pytest.mark.parametrize(
    "reference", ["#/$defs/none", "#/properties/both/0", "other.json", "#/$defs/both/anyOf/2", 3]
)
def test_a_reference_to_nothing_is_an_error(reference: Any) -> None:
    with pytest.raises(InexpressibleError, match=r"leads nowhere|only references within"):
        SchemaReferences(ROOT).target(reference)


def test_the_root_may_be_referred_to() -> None:
    root = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    alone = SchemaReferences(root).standalone({"$ref": "#"})
    assert jsonschema.Draft202012Validator(alone).is_valid({"next": {"next": {}}})
    assert not jsonschema.Draft202012Validator(alone).is_valid({"next": {"next": 1}})
