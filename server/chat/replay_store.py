"""The tokens of answers that were given here, so that a turn that comes back is read in the same tokens.

A model may spell a text in other tokens than the tokenizer would. When the text comes back as a turn of a
chat, tokenizing it again gives other tokens, and the prefix cache ends there. Here each answer's tokens are
found again by its text.

What a prompt is searched for are its segments between added tokens, such as ends of turns and the tags of
thoughts and calls, which the tokenizer never merges across. White space at their edges does not count, since
templates strip it or put their own. A segment's bytes stay what the chat template gave; only how they are
split into tokens changes.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import takewhile

from nybble.engine.tokenizer import Tokenizer

_ENTRY_COST = 64  # in tokens of 4 bytes: what an entry takes beside them


class ReplayStore:
    """Bounded; the least recently used answer goes first. Thread-safe.

    A salt's texts are found under that salt only. Keys are hashes of 256 bits: no text is kept, and no two
    texts are taken for each other.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        """max_tokens: in all entries, each of which counts as 64 more."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._entries: OrderedDict[bytes, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def replayed(self, salt: str, prompt: Sequence[int]) -> tuple[int, ...]:
        """The tokens of a prompt, with those of answers as they were given."""
        if not self._entries:
            return tuple(prompt)
        token_ids: list[int] = []
        for start, end in _segments(prompt, self._tokenizer):
            lead = prompt[start - 1] if start else None
            token_ids += self._respelled(salt, lead, prompt[start:end])
            token_ids += prompt[end : end + 1]
        return tuple(token_ids)

    def remember(self, salt: str, prompt: Sequence[int], answer: Sequence[int], text: str) -> None:
        """Keep the tokens of an answer to a prompt. `text` is what was sent of it: less than its tokens say
        where a stop string ended it."""
        spoken = self._spelling(list(takewhile(self._is_spoken, answer)), text)
        if spoken is None:
            return
        begun = list(takewhile(self._is_within_segment, reversed(prompt)))[::-1]
        lead = prompt[-len(begun) - 1] if len(begun) < len(prompt) else None
        turn = [*begun, *spoken]
        for start, end in _segments(turn, self._tokenizer):
            self._put(salt, turn[start - 1] if start else lead, turn[start:end])

    def _is_spoken(self, token_id: int) -> bool:
        return not self._tokenizer.is_special(token_id)

    def _is_within_segment(self, token_id: int) -> bool:
        return not self._tokenizer.is_added(token_id)

    def _respelled(self, salt: str, lead: int | None, segment: Sequence[int]) -> Sequence[int]:
        text = self._bytes(segment)
        known = self._find(_key(salt, lead, text.strip()))
        return segment if known is None else self._fitted(known, text) or segment

    def _fitted(self, known: Sequence[int], text: bytes) -> Sequence[int] | None:
        """Known tokens for a text that may have other white space at its edges: those there are the
        tokenizer's. None if that cuts a character."""
        given = self._bytes(known)
        if given == text:
            return known
        start, end = _margin(given), len(given.rstrip())
        kept, first, last = list[int](), end, end
        place = 0
        for token_id in known:
            next_place = place + len(self._tokenizer.token_bytes(token_id))
            if start <= place and next_place <= end:
                first = min(first, place)
                last = next_place
                kept.append(token_id)
            place = next_place
        shift = _margin(text) - start
        try:
            edges = text[: first + shift].decode(), text[last + shift :].decode()
        except UnicodeDecodeError:
            return None
        before, after = map(self._tokenizer.encode_text, edges)
        return [*before, *kept, *after]

    def _spelling(self, token_ids: Sequence[int], text: str) -> list[int] | None:
        """Tokens of a text: those given as far as they go, the rest by the tokenizer. None if they end within
        a character."""
        wanted, done, kept = text.encode(), 0, []
        for token_id in token_ids:
            token_bytes = self._tokenizer.token_bytes(token_id)
            if not wanted.startswith(token_bytes, done):
                break
            kept.append(token_id)
            done += len(token_bytes)
        try:
            rest = wanted[done:].decode()
        except UnicodeDecodeError:
            return None
        return [*kept, *self._tokenizer.encode_text(rest)]

    def _bytes(self, token_ids: Sequence[int]) -> bytes:
        return b"".join(map(self._tokenizer.token_bytes, token_ids))

    def _find(self, key: bytes) -> Sequence[int] | None:
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def _put(self, salt: str, lead: int | None, segment: Sequence[int]) -> None:
        if len(segment) < 2:  # there is no other way to spell it
            return
        key, token_ids = _key(salt, lead, self._bytes(segment).strip()), array("i", segment)
        with self._lock:
            self._drop(self._entries.pop(key, None))
            self._entries[key] = token_ids
            self._num_tokens += len(token_ids) + _ENTRY_COST
            while self._num_tokens > self._max_tokens:
                self._drop(self._entries.popitem(last=False)[1])

    def _drop(self, token_ids: array[int] | None) -> None:
        if token_ids is not None:
            self._num_tokens -= len(token_ids) + _ENTRY_COST


def _segments(token_ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Where the stretches between added tokens begin and end, empty ones included."""
    start = 0
    for place, token_id in enumerate(token_ids):
        if tokenizer.is_added(token_id):
            yield start, place
            start = place + 1
    yield start, len(token_ids)


def _margin(text: bytes) -> int:
    """How much white space is before it."""
    return len(text) - len(text.lstrip())


def _key(salt: str, lead: int | None, text: bytes) -> bytes:
    """lead: the added token before the text, which tells whose turn it is."""
    parts = (salt.encode(), str(lead).encode(), text)
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()
