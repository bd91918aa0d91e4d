"""References within a JSON schema, and parts of it that stand for themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.server.grammars.lark_text import InexpressibleError
from nybble.server.requests.json_pointer import value_at

_OF_SCHEMAS = ("properties", "patternProperties", "dependentSchemas")  # names -> schemas
_DATA = ("enum", "const", "default", "examples", "example")
_LEFT_OUT = ("$defs", "definitions", "$schema", "$id", "nullable")


class SchemaReferences:
    def __init__(self, root: Any) -> None:
        self._root = root

    def target(self, reference: Any) -> Any:
        """Raises InexpressibleError: it leads nowhere, or out of the schema."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise InexpressibleError(f"$ref {reference!r}: only references within the schema are followed")
        try:
            return value_at(self._root, reference)
        except LookupError as error:
            raise InexpressibleError(f"$ref {reference!r}: leads nowhere") from error

    def standalone(self, schema: Any) -> Any:
        """A part with all that it refers to, but without OpenAPI's "nullable", which is not JSON schema's."""
        names: dict[str, str] = {}
        part = _rewritten(schema, names)
        definitions: dict[str, Any] = {}
        while len(definitions) < len(names):
            reference = list(names)[len(definitions)]
            definitions[names[reference]] = _rewritten(self.target(reference), names)
        return part | {"$defs": definitions} if definitions else part


def _rewritten(schema: Any, names: dict[str, str]) -> Any:
    """With references to definitions, whose `names` are noted."""
    if isinstance(schema, list):
        return [_rewritten(part, names) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str):
            found[key] = "#/$defs/" + names.setdefault(value, f"d{len(names)}")
        elif key in _DATA:
            found[key] = value
        elif key in _OF_SCHEMAS and isinstance(value, Mapping):
            found[key] = {name: _rewritten(part, names) for name, part in value.items()}
        elif key not in _LEFT_OUT:
            found[key] = _rewritten(value, names)
    return found
