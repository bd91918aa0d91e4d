"""Which kinds of JSON values a JSON schema allows, as far as that matters for reading one from its text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

from nybble.server.requests.json_pointer import value_at

Kinds = frozenset[str]  # as a schema's "type" names them; where "number" is, "integer" is too

_MAX_DEPTH = 64


class SchemaKinds:
    """Reads parts of one schema. What is wrong in it says nothing; None is for what says nothing.

    Each reference is followed once, so that the work is bounded by the schema's size.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._of_reference: dict[str, Kinds | None] = {}

    def property(self, name: str) -> Any:
        """The schema of a property of the root, any of several where it has several parts or forms, or of
        those that it does not list."""
        parts = list(self._parts(self._root, {"#"}))
        lists = [properties for part in parts if isinstance(properties := part.get("properties"), Mapping)]
        found = [properties[name] for properties in lists if name in properties]
        found = found or [part["additionalProperties"] for part in parts if "additionalProperties" in part]
        return {"anyOf": found} if len(found) > 1 else next(iter(found), None)

    def _parts(self, schema: Any, followed: set[str], depth: int = 0) -> Iterator[Mapping[str, Any]]:
        """A schema and those that it joins, or gives to choose from."""
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return
        yield schema
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in followed:
            followed.add(reference)
            yield from self._parts(self._referenced(reference), followed, depth + 1)
        for key in ("allOf", "anyOf", "oneOf"):
            for part in _list(schema.get(key)):
                yield from self._parts(part, followed, depth + 1)

    def of(self, schema: Any, depth: int = 0) -> Kinds | None:
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return None
        found = [
            self._of_target(schema.get("$ref"), depth + 1),
            _declared(schema.get("type")),
            _kinds_of_values(schema.get("enum")),
            _kinds_of_values([schema["const"]] if "const" in schema else None),
            self._united(schema.get("anyOf"), depth + 1),
            self._united(schema.get("oneOf"), depth + 1),
            *(self.of(part, depth + 1) for part in _list(schema.get("allOf"))),
        ]
        said = [kinds for kinds in found if kinds is not None]
        if not said:
            return frozenset({"object"}) if "properties" in schema else None
        both = reduce(frozenset.intersection, said) or said[0]
        return both | {"null"} if schema.get("nullable") is True else both

    def _of_target(self, reference: Any, depth: int) -> Kinds | None:
        if not isinstance(reference, str):
            return None
        if reference not in self._of_reference:
            self._of_reference[reference] = None  # a reference that leads to itself says nothing
            self._of_reference[reference] = self.of(self._referenced(reference), depth)
        return self._of_reference[reference]

    def _united(self, schemas: Any, depth: int) -> Kinds | None:
        kinds = [self.of(part, depth) for part in _list(schemas)]
        said = [each for each in kinds if each is not None]
        return frozenset().union(*said) if said and len(said) == len(kinds) else None

    def _referenced(self, reference: str) -> Any:
        """What a reference within the schema leads to, or None."""
        try:
            return value_at(self._root, reference)
        except LookupError:
            return None


def _declared(names: Any) -> Kinds | None:
    given = [names] if isinstance(names, str) else _list(names)
    kinds = frozenset(name for name in given if isinstance(name, str))
    return (kinds | {"integer"} if "number" in kinds else kinds) or None


def _kinds_of_values(values: Any) -> Kinds | None:
    return frozenset(kind_of(value) for value in _list(values)) or None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def kind_of(value: object) -> str:
    """The kind of a JSON value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"
