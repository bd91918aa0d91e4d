"""A grammar in llguidance's variant of Lark, as it is written."""

from __future__ import annotations

import json
import re

from nybble.engine.grammar.grammar import MAX_CALLS_BYTES


class InexpressibleError(ValueError):
    """Something that a grammar cannot say. place: the request's field that asks for it, where known."""

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(message)
        self.place = place


class LarkText:
    """Rules, each on a line of its own, and the request's field that each comes from."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._places: list[str] = []
        self._num_characters = 0

    def add(self, kind: str, body: str, place: str) -> str:
        """A new rule, or terminal if `kind` is in capitals; gives its name."""
        name = f"{kind}{len(self._lines)}"
        self.set(name, body, place)
        return name

    def set(self, name: str, body: str, place: str) -> None:
        """A rule with a name that was used before it was known.

        Raises:
            InexpressibleError: the grammar has become too long.
        """
        self._num_characters += len(body)
        if self._num_characters > MAX_CALLS_BYTES:
            raise InexpressibleError(f"with this the grammar has more than {MAX_CALLS_BYTES} bytes", place)
        self._lines.append(f"{name}: {body}")
        self._places.append(place)

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(self._places)


def literal(text: str) -> str:
    """A text that is not empty, as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def regex(pattern: str) -> str:
    """A regular expression, which a slash would end and which must not have a line end."""
    escaped = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
    return f"/{escaped}/".replace("\n", "\\n").replace("\r", "\\r")
