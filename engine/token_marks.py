"""Marks the names of tokens in what clients write, so that a chat template can render it and they stay text.

A prompt is rendered as a string, in which a role token of the template and the same characters in a message
look alike. So the latter are told apart before: a mark, random digits that occur nowhere else, is put
into each name. It is inside the name, where templates that strip, join or quote a text leave it alone.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_THOUGHT_TAGS = frozenset({"<think>", "</think>"})


class TokenMarks:
    """`names`: of tokens that no client's text may turn into."""

    def __init__(self, names: Iterable[str]) -> None:
        names = {name for name in names if len(name) > 1}
        self.mark = f"{secrets.randbits(128):039}"  # digits: no name begins or ends with one
        self.end = f"{secrets.randbits(128):039}"  # for the end of a message
        self._pattern = _pattern(names)
        # A template may look for a thought in an assistant's content.
        self._answer_pattern = _pattern(names - _THOUGHT_TAGS)

    def mark_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The same messages, of which every text is marked."""
        return [self._message(message) for message in messages]

    def mark_value(self, value: Any) -> Any:
        """A copy of a text, or of what JSON can hold, of which every text is marked."""
        return self._marked(value, self._pattern)

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        has_content_only = message.get("role") == "assistant" and message.get("reasoning_content") is None
        content_pattern = self._answer_pattern if has_content_only else self._pattern
        return {
            name: self._marked(value, content_pattern if name == "content" else self._pattern)
            for name, value in message.items()
        }

    def _marked(self, value: Any, pattern: re.Pattern[str]) -> Any:
        match value:
            case str():
                return pattern.sub(self.mark, value)
            case Mapping():
                return {self._marked(key, pattern): self._marked(one, pattern) for key, one in value.items()}
            case list() | tuple():
                return [self._marked(one, pattern) for one in value]
        return value


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Matches the empty text after the first character of each name, also of those that overlap."""
    rests: dict[str, list[str]] = {}
    for name in sorted(names):
        rests.setdefault(name[0], []).append(re.escape(name[1:]))
    places = [f"(?<={re.escape(first)})(?={'|'.join(rest)})" for first, rest in rests.items()]
    return re.compile("|".join(places) or r"(?!)")
