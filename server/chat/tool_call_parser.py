"""Reads one tool call in GLM's markup.

<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>

GLM-4.5 and 4.6 write line ends between these, which mean nothing. Values have no escapes: one ends at the
first </arg_value>, whatever else is in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from nybble.server.chat.argument_types import ArgumentType, ArgumentTypes, string_piece

CALL, END_CALL = "<tool_call>", "</tool_call>"
KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"
CALL_TAGS = (CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE)

NAME = r"[\w.:/@-]{1,256}"
_BEGINS_NAME = re.compile(r"\s*[\w.:/@-]{0,256}\s*")


@dataclass(frozen=True)
class CallStart:
    """A call of the tool `name`, which may be none of the request's."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of its arguments, a JSON object."""

    text: str


@dataclass(frozen=True)
class Stray:
    """Text within a call that is no part of it."""

    text: str


CallPiece = CallStart | CallArguments | Stray


class ToolCallParser:
    """Takes what follows <tool_call>, cut at tags, until it `is_over`.

    If that was no call after all, `rejected` is its text.
    """

    def __init__(self, types_of_tool: Callable[[str], ArgumentTypes]) -> None:
        self._types_of_tool = types_of_tool
        self._types = ArgumentTypes(None)
        self._state: Literal["name", "between", "key", "after key", "value"] = "name"
        self._held = ""  # of a name, a key, or a value whose type is not string
        self._key = ""
        self._type = ArgumentType()
        self._is_stray = False
        self._has_arguments = False
        self.is_over = False
        self.rejected: str | None = None

    def take(self, part: str) -> Iterator[CallPiece]:
        """A tag, or text without tags, that it `accepts`."""
        match self._state:
            case "name":
                yield from self._take_name(part)
            case "between":
                yield from self._take_between(part)
            case "key":
                yield from self._take_key(part)
            case "after key":
                yield from self._take_after_key(part)
            case "value":
                yield from self._take_value(part)

    def accepts(self, part: str) -> bool:
        """Whether this may belong to the call: a new call does not, and is for who has finished this one."""
        return self._state == "value" or part != CALL

    def finish(self, is_cut: bool) -> Iterator[CallPiece]:
        """The text ended. A call that the model ended is made whole; one that was cut stays as it is."""
        if self._state == "name":
            self._reject()
        elif not is_cut:
            if self._state == "value":
                yield from self._take_value(END_VALUE)
            elif self._state != "between":
                yield from self._abandon_key()
            yield from self._take_between(END_CALL)
        elif self._state == "value" and not self._type.is_text:
            yield CallArguments(self._before_value() + self._type.to_cut_json(self._held))

    def _reject(self) -> None:
        self.rejected = CALL + self._held

    def _take_name(self, part: str) -> Iterator[CallPiece]:
        name = self._held.strip()
        if part in (KEY, END_CALL) and re.fullmatch(NAME, name):
            self._types = self._types_of_tool(name)
            self._state = "between"
            yield CallStart(name)
            yield from self._take_between(part)
            return
        self._held += part
        if part in CALL_TAGS or not _BEGINS_NAME.fullmatch(self._held):
            self._reject()

    def _take_between(self, part: str) -> Iterator[CallPiece]:
        match part:
            case "<arg_key>":
                self._state, self._held, self._is_stray = "key", "", False
            case "</tool_call>":
                self.is_over = True
                yield CallArguments("}" if self._has_arguments else "{}")
            case _:
                yield from self._stray(part)

    def _take_key(self, part: str) -> Iterator[CallPiece]:
        match part:
            case "</arg_key>":
                self._key = self._held.strip()
                self._state = "after key"
            case "</tool_call>":
                yield from self._abandon_key()
                yield from self._take_between(part)
            case _:
                self._held += part

    def _take_after_key(self, part: str) -> Iterator[CallPiece]:
        match part:
            case "<arg_value>":
                self._state, self._held, self._is_stray = "value", "", False
                self._type = self._types.of(self._key)
                if self._type.is_text:
                    yield CallArguments(self._before_value() + '"')
            case "<arg_key>" | "</tool_call>":
                yield from self._abandon_key()
                yield from self._take_between(part)
            case _:
                yield from self._stray(part)

    def _take_value(self, part: str) -> Iterator[CallPiece]:
        if part != END_VALUE:
            if self._type.is_text:
                yield CallArguments(string_piece(part))
            else:
                self._held += part
            return
        self._state = "between"
        if self._type.is_text:
            yield CallArguments('"')
        else:
            yield CallArguments(self._before_value() + self._type.to_json(self._held))

    def _abandon_key(self) -> Iterator[CallPiece]:
        """A key that has no value."""
        end = END_KEY if self._state == "after key" else ""
        self._state, self._is_stray = "between", False
        yield Stray(KEY + self._held + end)

    def _before_value(self) -> str:
        opening = ", " if self._has_arguments else "{"
        self._has_arguments = True
        return f'{opening}"{string_piece(self._key)}": '

    def _stray(self, part: str) -> Iterator[Stray]:
        """White space between tags means nothing."""
        text = part if self._is_stray else part.lstrip()
        if text:
            self._is_stray = True
            yield Stray(text)
