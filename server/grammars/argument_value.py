"""The values of one argument of a tool, as GLM writes them: strings as they are, all else as JSON.

What reads a call takes a text for a number, say, where the schema allows both (see `ArgumentType`), so a
string that looks like one cannot be written there and is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nybble.server.chat.schema_kinds import Kinds, SchemaKinds
from nybble.server.grammars.lark_text import InexpressibleError, LarkText, regex
from nybble.server.grammars.schema_references import SchemaReferences
from nybble.server.grammars.text_language import TextLanguage, without

_EVERY_KIND = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_SPACE = r"[\s\x1c-\x1f\x85]*"
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"

# Texts that are read as values of other kinds, or become such without quotes.
_LOOKS_LIKE = {
    "array": rf"{_SPACE}\[(?s:.*)",
    "boolean": f"{_SPACE}(?:true|false){_SPACE}",
    "integer": f"{_SPACE}{_NUMBER}{_SPACE}",
    "null": f"{_SPACE}null{_SPACE}",
    "number": f"{_SPACE}{_NUMBER}{_SPACE}",
    "object": rf"{_SPACE}\{{(?s:.*)",
}
_QUOTED = rf'{_SPACE}"(?s:.*)"{_SPACE}'


class ArgumentValue:
    """Adds rules for values to `rules`. language: of the strings of the same schema."""

    def __init__(
        self, rules: LarkText, references: SchemaReferences, language: TextLanguage, is_lenient: bool
    ) -> None:
        self._rules = rules
        self._references = references
        self._language = language
        self._is_lenient = is_lenient

    def add(self, schema: Any, kinds: Kinds | None, place: str) -> str:
        """A rule for the values of a schema; gives its name. kinds: by which such values are read.

        Raises:
            InexpressibleError: there are none, or what they are cannot be said.
        """
        schema = schema if isinstance(schema, Mapping) else {}
        alternatives = [*self._strings(schema, kinds, place), *self._others(schema, kinds, place)]
        if not alternatives:
            raise InexpressibleError("no value is allowed")
        return self._rules.add("value", " | ".join(alternatives), place)

    def _strings(self, schema: Any, kinds: Kinds | None, place: str) -> list[str]:
        if kinds is not None and "string" not in kinds:
            return []
        language = self._language.of(schema)
        if language is None:
            return []
        others = (_EVERY_KIND if kinds is None else kinds) - {"string"}
        if others:
            looks = {_LOOKS_LIKE[kind] for kind in others} | {_QUOTED}
            language = without(language, *map(regex, sorted(looks)))
        return [self._rules.add("TEXT", language, place)]

    def _others(self, schema: Any, kinds: Kinds | None, place: str) -> list[str]:
        if kinds == frozenset({"string"}):
            return []
        alone = self._references.standalone(schema)
        allowed = SchemaKinds(alone).of(alone) or _EVERY_KIND
        others = sorted(allowed - {"string"})
        if not others:
            return []
        if "string" in allowed:
            alone = self._references.standalone({"allOf": [schema, {"type": others}]})
        return [self._rules.add("json", f"%json {json.dumps(alone | self._spaces())}", place)]

    def _spaces(self) -> dict[str, Any]:
        """As chat templates write JSON, or closer."""
        return {
            "x-guidance": {
                "whitespace_flexible": False,
                "item_separator": ", ?",
                "key_separator": ": ?",
                "lenient": self._is_lenient,
            }
        }
