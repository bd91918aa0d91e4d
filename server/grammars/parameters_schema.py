"""A tool's parameters as what their schema says of single arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from math import prod
from typing import Any

from nybble.server.grammars.lark_text import InexpressibleError
from nybble.server.grammars.schema_references import SchemaReferences

_MAX_FORMS = 64
_MAX_DEPTH = 32

# Keywords about an object as a whole that are not followed.
_UNCHECKED = (
    "patternProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "unevaluatedProperties",
    "if",
    "then",
    "else",
    "not",
    "enum",
    "const",
    "oneOf",
)


@dataclass(frozen=True)
class Form:
    """Schemas that arguments must all fulfil, without references and alternatives at their top."""

    parts: tuple[Mapping[str, Any], ...]

    @property
    def names(self) -> list[str]:
        """Arguments that are spoken of: listed ones in their order, then those that are required besides."""
        listed = [name for part in self.parts for name in part.get("properties") or ()]
        return list(dict.fromkeys([*listed, *self._required]))

    def is_required(self, name: str) -> bool:
        return name in self._required

    def schema_of(self, name: str | None) -> Any:
        """Of an argument, or with None of one that is not spoken of; False if there must be none."""
        found = [
            (part.get("properties") or {}).get(name, part.get("additionalProperties", True))
            for part in self.parts
        ]
        if any(schema is False for schema in found):
            return False
        said = [schema for schema in found if isinstance(schema, Mapping) and schema]
        return {"allOf": said} if len(said) > 1 else said[0] if said else {}

    @property
    def contradictions(self) -> list[str]:
        """Arguments that are required and must not be there."""
        return [name for name in self._required if self.schema_of(name) is False]

    @property
    def asks_for_others(self) -> bool:
        """Whether arguments that are not spoken of are wanted, and not just not forbidden."""
        has_list = any("properties" in part for part in self.parts)
        is_said = any("additionalProperties" in part for part in self.parts)
        return (is_said or not has_list) and self.schema_of(None) is not False

    @property
    def _required(self) -> list[str]:
        return [name for part in self.parts for name in _list(part.get("required")) if isinstance(name, str)]


def forms_of(parameters: Any, references: SchemaReferences, is_lenient: bool) -> list[Form]:
    """One for each alternative. Raises InexpressibleError."""
    if parameters is None:
        return [Form(({"properties": {}, "additionalProperties": False},))]
    parts = _forms(parameters, references, is_lenient, 0)
    return [Form(tuple(form)) for form in parts]


def _forms(
    schema: Any, references: SchemaReferences, is_lenient: bool, depth: int
) -> Sequence[tuple[Mapping[str, Any], ...]]:
    if schema is False:
        return []
    if not isinstance(schema, Mapping):
        return [()]
    if depth > _MAX_DEPTH:
        raise InexpressibleError("refers to itself, or is nested too deep")
    _check(schema, is_lenient)
    choices: list[Sequence[tuple[Mapping[str, Any], ...]]] = [[(schema,)]]
    for alternatives in _applied(schema, references):
        found = [form for part in alternatives for form in _forms(part, references, is_lenient, depth + 1)]
        choices.append(found)
    if prod(map(len, choices)) > _MAX_FORMS:
        raise InexpressibleError(f"has more than {_MAX_FORMS} forms")
    return [tuple(chain(*choice)) for choice in product(*choices)]


def _applied(schema: Mapping[str, Any], references: SchemaReferences) -> Iterator[Sequence[Any]]:
    """What else must be fulfilled: one of each of these."""
    if "$ref" in schema:
        yield [references.target(schema["$ref"])]
    for part in _list(schema.get("allOf")):
        yield [part]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            yield _list(schema[key])


def _check(schema: Mapping[str, Any], is_lenient: bool) -> None:
    if not isinstance(schema.get("properties", {}), Mapping):
        raise InexpressibleError("properties: expected an object")
    kinds = schema.get("type", "object")
    if kinds != "object" and "object" not in _list(kinds):
        raise InexpressibleError(f"type {kinds!r}: arguments are an object")
    unchecked = [key for key in _UNCHECKED if key in schema]
    if unchecked and not is_lenient:
        raise InexpressibleError(f"{unchecked[0]} cannot be expressed for the arguments as a whole")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
