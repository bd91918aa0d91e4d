"""Which texts a JSON schema allows, as a terminal of a Lark grammar: GLM writes a string as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nybble.engine.grammar.grammar import MAX_CALLS_BYTES
from nybble.server.grammars.lark_text import InexpressibleError, literal, regex
from nybble.server.grammars.schema_references import SchemaReferences
from nybble.server.grammars.text_formats import FORMATS
from nybble.server.grammars.text_pattern import of_whole_text

ANY_TEXT = regex("(?s:.*)")
EMPTY = regex("(?:)")
_MAX_PARTS = 2000  # of a schema, each time that it is referred to
_UNCHECKED = ("if", "then", "else")


class TextLanguage:
    """Of the parts of one schema. is_lenient: what cannot be expressed is ignored where that allows more."""

    def __init__(self, references: SchemaReferences, end: str, is_lenient: bool) -> None:
        """end: what no text may hold."""
        self._references = references
        self._end = end
        self._is_lenient = is_lenient
        self._num_parts = 0
        self._open: list[str] = []  # references that are being followed

    def of(self, schema: Any) -> str | None:
        """None if no text is allowed. Raises InexpressibleError."""
        if schema is False:
            return None
        if not isinstance(schema, Mapping):
            return ANY_TEXT
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise InexpressibleError("has too many parts")
        parts = []
        for part in self._parts(schema):
            if part is None:
                return None
            parts.append(part)
        said = [part for part in parts if part != ANY_TEXT]
        return _bounded(" & ".join(f"({part})" for part in said)) or ANY_TEXT

    def _parts(self, schema: Mapping[str, Any]) -> Iterator[str | None]:
        """All of them apply."""
        yield _of_type(schema.get("type", "string"))
        if "enum" in schema:
            yield self._literals(schema["enum"])
        if "const" in schema:
            yield self._literals([schema["const"]])
        if "$ref" in schema:
            yield self._of_target(schema["$ref"])
        yield from map(self.of, _list(schema.get("allOf")))
        if "anyOf" in schema:
            yield _either([self.of(part) for part in _list(schema["anyOf"])])
        if "oneOf" in schema:
            yield _exactly_one([self.of(part) for part in _list(schema["oneOf"])])
        if "not" in schema:
            yield _without(ANY_TEXT, [self.of(schema["not"])])
        yield from self._of_text(schema)

    def _of_target(self, reference: Any) -> str | None:
        if reference in self._open:
            raise InexpressibleError(f"$ref {reference!r}: refers to itself")
        target = self._references.target(reference)
        self._open.append(reference)
        found = self.of(target)
        self._open.pop()
        return found

    def _of_text(self, schema: Mapping[str, Any]) -> Iterator[str]:
        if not self._is_lenient and any(key in schema for key in _UNCHECKED):
            raise InexpressibleError("if, then and else cannot be expressed")
        if isinstance(schema.get("pattern"), str):
            yield self._or_any(of_whole_text, schema["pattern"])
        if isinstance(schema.get("format"), str):
            yield self._or_any(_of_format, schema["format"])
        least, most = _length(schema.get("minLength")) or 0, _length(schema.get("maxLength"))
        if least or most is not None:
            yield regex(f"(?s:.){{{least},{'' if most is None else most}}}")

    def _or_any(self, express: Any, what: str) -> str:
        try:
            return regex(express(what))
        except InexpressibleError:
            if self._is_lenient:
                return ANY_TEXT
            raise

    def _literals(self, values: Any) -> str | None:
        texts = [value for value in _list(values) if isinstance(value, str) and self._end not in value]
        return " | ".join(literal(text) if text else EMPTY for text in texts) or None


def without(language: str, *others: str) -> str:
    """Texts of a language that are in none of the others."""
    return _without(language, list(others))


def _without(language: str, others: list[str | None]) -> str:
    excluded = "".join(f" & ~({other})" for other in others if other is not None)
    return f"({language}){excluded}" if excluded else language


def _either(languages: list[str | None]) -> str | None:
    found = [language for language in languages if language is not None]
    if ANY_TEXT in found:
        return ANY_TEXT
    return " | ".join(f"({language})" for language in found) or None


def _exactly_one(languages: list[str | None]) -> str | None:
    found = [language for language in languages if language is not None]
    if len(found) * sum(map(len, found)) > MAX_CALLS_BYTES:
        raise InexpressibleError("oneOf: too many alternatives")
    alone = [
        _without(f"{ANY_TEXT} & ({language})", [*found[:index], *found[index + 1 :]])
        for index, language in enumerate(found)
    ]
    return _either([*alone])


def _bounded(language: str) -> str:
    if len(language) > MAX_CALLS_BYTES:
        raise InexpressibleError("too long as a grammar")
    return language


def _of_type(names: Any) -> str | None:
    return ANY_TEXT if names == "string" or "string" in _list(names) else None


def _of_format(name: str) -> str:
    if name not in FORMATS:
        raise InexpressibleError(f"format {name!r} is not known")
    return FORMATS[name]


def _length(value: Any) -> int | None:
    """A length may be written 3.0."""
    return int(value) if isinstance(value, int | float) and value >= 0 else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
