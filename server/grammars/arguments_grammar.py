"""The arguments of a tool's call in GLM's markup, by the tool's schema, in the schema's order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.server.chat.argument_types import ArgumentTypes
from nybble.server.chat.tool_call_parser import CALL_TAGS, END_KEY, END_VALUE, KEY, VALUE
from nybble.server.grammars.argument_value import ArgumentValue
from nybble.server.grammars.lark_text import InexpressibleError, LarkText, literal, regex
from nybble.server.grammars.parameters_schema import Form, forms_of
from nybble.server.grammars.schema_references import SchemaReferences
from nybble.server.grammars.text_language import ANY_TEXT, TextLanguage, without

LINE_END = f"{literal(chr(10))}?"  # GLM-4.5 and 4.6 write one between the tags of a call, GLM-4.7 none
_ANY_NAME = regex(r"[^<\s](?:[^<]*[^<\s])?")


class ArgumentsGrammar:
    """Adds the rules for one tool's arguments to `rules`.

    tags: how a grammar writes each tag; place: the request's field that has the schema.
    """

    def __init__(
        self, rules: LarkText, tags: Mapping[str, str], parameters: Any, place: str, is_lenient: bool
    ) -> None:
        self._rules = rules
        self._tags = tags
        self._parameters = parameters
        self._place = place
        self._is_lenient = is_lenient
        self._types = ArgumentTypes(parameters)
        self._references = SchemaReferences(parameters)
        language = TextLanguage(self._references, END_VALUE, is_lenient)
        self._values = ArgumentValue(rules, self._references, language, is_lenient)

    def add(self) -> str:
        """A rule for arguments that the schema allows; gives its name.

        Raises:
            InexpressibleError: there are none, or what they are cannot be said.
        """
        forms = forms_of(self._parameters, self._references, self._is_lenient)
        possible = [form for form in forms if not form.contradictions]
        if not possible:
            names = [name for form in forms for name in form.contradictions]
            raise InexpressibleError(f"no arguments are allowed{_because(names)}")
        return self._rules.add("arguments", " | ".join(map(self._of_form, possible)), self._place)

    def add_any(self) -> str:
        """A rule for arguments of any names and values."""
        name = self._rules.add("NAME", _ANY_NAME, self._place)
        value = self._rules.add("TEXT", ANY_TEXT, self._place)
        return self._rules.add("arguments", f"({self._argument(name, value)})*", self._place)

    def _of_form(self, form: Form) -> str:
        arguments = [self._listed(form, name) for name in form.names if form.schema_of(name) is not False]
        if form.asks_for_others:
            arguments.append(self._others(form))
        return self._rules.add("form", " ".join(arguments) or '""', self._place)

    def _listed(self, form: Form, name: str) -> str:
        place = f"{self._place}.properties.{name}"
        if name != name.strip() or any(tag in name for tag in CALL_TAGS):
            raise InexpressibleError(f"an argument named {name!r} cannot be written in a call", place)
        try:
            value = self._values.add(form.schema_of(name), self._types.of(name).kinds, place)
        except InexpressibleError as error:
            raise InexpressibleError(str(error), error.place or place) from error
        rule = self._rules.add("argument", self._argument(literal(name) if name else "", value), place)
        return rule if form.is_required(name) else f"{rule}?"

    def _others(self, form: Form) -> str:
        names = without(_ANY_NAME, *(literal(name) for name in form.names if name))
        name = self._rules.add("NAME", names, self._place)
        kinds = self._types.of("\0").kinds  # no name that can be written, so those of an unknown one
        value = self._values.add(form.schema_of(None), kinds, self._place)
        return f"({self._argument(name, value)})*"

    def _argument(self, name: str, value: str) -> str:
        key, end_key, start, end = (self._tags[tag] for tag in (KEY, END_KEY, VALUE, END_VALUE))
        return f"{key} {name} {end_key} {LINE_END} {start} {value} {end} {LINE_END}"


def _because(names: list[str]) -> str:
    return f": {names[0]!r} is required and must not be there" if names else ""
