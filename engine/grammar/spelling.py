"""Which tokens would spell a tag in ordinary text, such as </arg_value> within an argument.

What reads a text cannot tell a tag that was spelled from the token of that name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nybble.engine.grammar.token_words import Words, words_of


class Spelling:
    """Of some tags. A `tail` is what a text may end in of one that is not complete; at first it is empty."""

    def __init__(self, tags: Sequence[bytes], pieces: Mapping[int, bytes], num_words: int) -> None:
        """pieces: the bytes of every token that can complete a tag."""
        self._tags = tags
        self._pieces = pieces
        self._num_words = num_words
        self._room = max(map(len, tags)) - 1
        self._known: dict[tuple[int, ...], Words] = {}  # by how much of each tag is there

    def tail_after(self, tail: bytes, pieces: Iterable[bytes]) -> bytes:
        """After more tokens, of these bytes. One without bytes is a tag, which no text goes on after."""
        for piece in pieces:
            tail = (tail + piece)[-self._room :] if piece else b""
        return tail

    def completing(self, tail: bytes) -> Words:
        """Tokens after which a tag would be complete."""
        begun = tuple(_num_begun(tag, tail) for tag in self._tags)
        if begun not in self._known:
            self._known[begun] = words_of(self._that_complete(begun), self._num_words)
        return self._known[begun]

    def _that_complete(self, begun: Sequence[int]) -> list[int]:
        starts = [(tag, tag[:length]) for tag, length in zip(self._tags, begun, strict=True)]
        return [
            token_id
            for token_id, piece in self._pieces.items()
            if any(tag in start + piece for tag, start in starts)
        ]


def _num_begun(tag: bytes, tail: bytes) -> int:
    """How many bytes of a tag a text ends in."""
    return next(length for length in range(len(tag) - 1, -1, -1) if tail.endswith(tag[:length]))
