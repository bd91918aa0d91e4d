"""Arguments of tool calls, which GLM writes as text, as JSON of the types that a tool's schema has for them.

GLM writes a string as it is and anything else as JSON, so the text alone does not tell the string 3 from the
number. Where the schema allows both, it is what its text is as JSON; where it says nothing, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nybble.server.chat.schema_kinds import Kinds, SchemaKinds, kind_of


@dataclass(frozen=True)
class ArgumentType:
    """kinds: those that the schema allows; None if it does not say."""

    kinds: Kinds | None = None

    @property
    def is_text(self) -> bool:
        """Whether any text is a value, so that it need not be read to its end."""
        return self.kinds == frozenset({"string"})

    def to_json(self, text: str) -> str:
        """A value as JSON: as the schema has it if that can be, else whatever the text is."""
        if self.is_text:
            return _quoted(text)
        stripped = text.strip()
        fitting = self._fitting(stripped) or self._fitting(_unquoted(stripped))
        if fitting is not None:
            return fitting
        may_be_string = self.kinds is None or "string" in self.kinds
        is_json = _kind_of_json(stripped) is not None
        return stripped if is_json and not may_be_string else _quoted(text)

    def to_cut_json(self, text: str) -> str:
        """The beginning of a value as the beginning of JSON."""
        may_be_string = self.kinds is None or "string" in self.kinds
        start = {"{": "object", "[": "array"}.get(text.strip()[:1])
        is_json = start is not None and (self.kinds is None or start in self.kinds)
        return text.lstrip() if is_json or not may_be_string else _quoted(text)[:-1]

    def _fitting(self, text: str) -> str | None:
        """A text that is JSON of an allowed kind other than string, or means one."""
        kind = _kind_of_json(text)
        if kind not in (None, "string") and (self.kinds is None or kind in self.kinds):
            return text
        if self.kinds is None or "string" in self.kinds:
            return None
        if kind == "number" and "integer" in self.kinds and float(text).is_integer():
            return str(int(float(text)))
        meant = {"true": "boolean", "false": "boolean", "none": "null", "null": "null"}.get(text.lower())
        return text.lower().replace("none", "null") if meant in self.kinds else None


class ArgumentTypes:
    """Of one tool, by its JSON schema, which may be wrong: then it says nothing."""

    def __init__(self, parameters: Any) -> None:
        self._schemas = SchemaKinds(parameters)
        self._known: dict[str, ArgumentType] = {}

    def of(self, name: str) -> ArgumentType:
        if name not in self._known:
            self._known[name] = ArgumentType(self._schemas.of(self._schemas.property(name)))
        return self._known[name]


def string_piece(text: str) -> str:
    """Part of a JSON string, without its quotes."""
    return _quoted(text)[1:-1]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _unquoted(text: str) -> str:
    return str(json.loads(text)) if _kind_of_json(text) == "string" else text


def _kind_of_json(text: str) -> str | None:
    """The kind of a JSON text; None if it is none."""
    try:
        return kind_of(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
