"""Where an answer is in its grammar, and which tokens may be next."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

_MAX_MASK_TIME = 1.0  # seconds; all other requests wait that long
_WORD = 32  # tokens in a word of a mask
MAX_DIGITS = 64  # tokens in a row: a model can be caught in endless digits


class Numerals(NamedTuple):
    """digits: tokens of nothing but digits; letter: one that may come in a string and in no number."""

    digits: frozenset[int]
    letter: int


class GrammarState:
    """A function of its tokens, which `append` is told one by one.

    The grammar begins after the first `after_token_id` of the answer, if that is given: until then all is
    allowed but the end. `failure` says why no more can be said about what is allowed, if so.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        after_token_id: int | None,
        stop_token_ids: Sequence[int],
        num_token_ids: int,
        numerals: Numerals | None = None,
    ) -> None:
        """numerals: for JSON, whose numbers then have at most MAX_DIGITS tokens of digits in a row."""
        self._matcher = matcher
        self._after_token_id = after_token_id  # None once it has come
        self._stops = {token_id for token_id in stop_token_ids if token_id < num_token_ids}
        self._num_token_ids = num_token_ids
        self._all_words = _words(range(num_token_ids), -(-num_token_ids // _WORD))
        self._stop_words = _words(self._stops, len(self._all_words))
        self._numerals = numerals
        self._digit_words = None if numerals is None else _words(numerals.digits, len(self._all_words))
        self._num_digits = 0  # tokens of digits at the end
        self._masks: dict[tuple[int, ...], NDArray[np.int32] | None] = {}  # of the next token, by drafts
        self.failure: str | None = None

    def append(self, token_id: int) -> None:
        self._masks.clear()
        self._num_digits = self._digits_after((token_id,))
        if self._after_token_id is not None:
            if token_id == self._after_token_id:
                self._after_token_id = None
        elif self.failure is None and token_id not in self._stops:
            self._matcher.consume_token(token_id)
            self._check()

    def has_begun(self, drafts: Sequence[int] = ()) -> bool:
        return self._after_token_id is None or self._after_token_id in drafts

    def allowed_words(self, drafts: Sequence[int] = ()) -> NDArray[np.int32] | None:
        """Of the token after `drafts`: int32 [ceil(num_token_ids / 32)], a bit for each token, the lowest
        first. None if all are allowed, as where the drafts are not what the grammar allows: the first of
        them that is not will be refused."""
        key = tuple(drafts)
        if key not in self._masks:
            self._masks[key] = self._words_after(key)
        return self._masks[key]

    def leaves_some(self, banned: set[int], drafts: Sequence[int] = ()) -> bool:
        """Whether a token is left that the grammar allows."""
        words = self.allowed_words(drafts)
        if words is None:
            return len(banned) < self._num_token_ids
        return bool((words & ~_words(banned, len(words))).any())

    def _words_after(self, drafts: tuple[int, ...]) -> NDArray[np.int32] | None:
        if self.failure is not None or not self.has_begun(drafts):
            return None
        if self._after_token_id is not None:
            drafts = drafts[drafts.index(self._after_token_id) + 1 :]
        if self._stops.intersection(drafts):
            return None  # the answer ends there
        num_followed = self._matcher.try_consume_tokens(list(drafts)) if drafts else 0
        words = self._mask() if num_followed == len(drafts) else None
        if words is not None and self._digits_after(drafts) >= MAX_DIGITS:
            words = self._without_digits(words)
        if num_followed:
            self._matcher.rollback(num_followed)
        self._check()
        return words

    def _mask(self) -> NDArray[np.int32] | None:
        start = time.monotonic()
        words: NDArray[np.int32] = np.frombuffer(self._matcher.compute_bitmask(), dtype="<i4")
        if time.monotonic() - start > _MAX_MASK_TIME:
            self.failure = "its grammar took too long for a token"
        words = words[: len(self._all_words)] & self._all_words
        if self._matcher.is_accepting():
            words |= self._stop_words
        if not words.any():
            self.failure = "its grammar allows no token of the vocabulary"
            return None
        return words

    def _digits_after(self, token_ids: Sequence[int]) -> int:
        """Tokens of digits at the end, if these are added."""
        count = self._num_digits
        for token_id in token_ids:
            is_digit = self._numerals is not None and token_id in self._numerals.digits
            count = count + 1 if is_digit else 0
        return count

    def _without_digits(self, words: NDArray[np.int32]) -> NDArray[np.int32]:
        """As far as it is a number that may end here; in a string, digits may go on."""
        if self._numerals is None or self._digit_words is None or _has(words, self._numerals.letter):
            return words
        rest = words & ~self._digit_words
        return rest if rest.any() else words

    def _check(self) -> None:
        if self._matcher.is_error():
            self.failure = f"its grammar failed: {summary(self._matcher.get_error())}"


def summary(error: str) -> str:
    """Of the library's errors, which quote a grammar whole: the first line, and that of the regex parser."""
    lines = error.strip().splitlines() or [""]
    return " ".join([lines[0], *(line for line in lines[1:] if line.startswith("error:"))])[:300]


def _has(words: NDArray[np.int32], token_id: int) -> bool:
    return bool(words[token_id // _WORD] >> token_id % _WORD & 1)


def _words(token_ids: Collection[int], num_words: int) -> NDArray[np.int32]:
    """int32 [num_words]: a mask of some tokens."""
    is_in = np.zeros(num_words * _WORD, dtype=np.uint8)
    is_in[list(token_ids)] = 1
    return np.packbits(is_in, bitorder="little").view("<i4")
