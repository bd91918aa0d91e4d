"""Cuts a text at the tags in it, however it comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable


class TagSplitter:
    """Holds back an end that may become a tag.

    Every tag begins with "<" and has no other "<". None is the beginning of another.
    """

    def __init__(self, tags: Iterable[str]) -> None:
        self._tags = frozenset(tags)
        self._pattern = re.compile("({})".format("|".join(map(re.escape, sorted(self._tags)))))
        self._held = ""

    def feed(self, text: str) -> list[str]:
        """What is certain now: tags, and the text between them, which is never a tag."""
        if not self._tags or (not self._held and "<" not in text):
            return [text] if text else []
        *parts, rest = self._pattern.split(self._held + text)
        cut = self._num_certain(rest)
        self._held = rest[cut:]
        return [part for part in (*parts, rest[:cut]) if part]

    def finish(self) -> list[str]:
        """The text ended: what was held back is no tag."""
        rest, self._held = self._held, ""
        return [rest] if rest else []

    def _num_certain(self, text: str) -> int:
        start = text.rfind("<")
        may_become_tag = start >= 0 and any(tag.startswith(text[start:]) for tag in self._tags)
        return start if may_become_tag else len(text)
