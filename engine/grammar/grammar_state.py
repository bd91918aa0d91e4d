"""Where an answer is in its grammar, and which tokens may be next."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
from llguidance import LLMatcher

from nybble.engine.grammar.grammar import Grammar
from nybble.engine.grammar.grammar_tokens import GrammarTokens
from nybble.engine.grammar.token_words import Words, has, words_of

_MAX_SPACES = 3  # tokens of white space before a thought
MAX_DIGITS = 64  # tokens in a row: a model can be caught in endless digits


class GrammarState:
    """A function of its tokens, which `append` is told one by one.

    Until its thought is over all is allowed but the end and what the grammar reserves. A model that may think
    or not is held to the grammar if its first token other than white space opens no thought. `failure` says
    why no more can be said about what is allowed, if so.
    """

    def __init__(
        self, matcher: LLMatcher, grammar: Grammar, stop_token_ids: Sequence[int], tokens: GrammarTokens
    ) -> None:
        """matcher: new, and of no other state. stop_token_ids: below tokens.num_token_ids."""
        self._matcher = matcher
        self._grammar = grammar
        self._thought = grammar.thought
        self._tokens = tokens
        self._phase: Literal["start", "thought", "form"] = "form"
        if self._thought is not None:
            self._phase = "thought" if self._thought.start_token_id is None else "start"
        self._stops = frozenset(stop_token_ids)
        self._stop_words = words_of(self._stops, tokens.num_words)
        reserved = grammar.reserved_token_ids
        self._thought_words = tokens.all_words & ~words_of({*self._stops, *reserved}, tokens.num_words)
        self._spelling = tokens.spelling(reserved) if reserved else None
        self._tail = b""  # of what the spelling is about
        self._numerals = tokens.numerals if grammar.kind in ("json_schema", "calls") else None
        self._num_digits = 0  # tokens of digits at the end
        self._num_spaces = 0  # tokens of white space before a thought
        self._is_refused = False  # the form does not begin with these spaces
        self._masks: dict[tuple[int, ...], Words | None] = {}  # of the next token, by drafts
        self.failure: str | None = None

    def append(self, token_id: int) -> None:
        if self.failure is not None:
            return
        self._masks.clear()
        self._num_digits = self._digits_after((token_id,))
        self._tail = self._tail_after((token_id,))
        if self._phase == "start":
            self._append_at_start(token_id)
        elif self._phase == "form":
            self._consume(token_id)
        elif self._thought is not None and token_id == self._thought.end_token_id:
            self._phase = "form"

    def allowed_words(self, drafts: Sequence[int] = ()) -> Words | None:
        """Of the token after `drafts`. None if all are allowed, as where the drafts are not what the grammar
        allows: the first of them that is not will be refused."""
        key = tuple(drafts)
        if key not in self._masks:
            self._masks[key] = self._words_after(key)
        return self._masks[key]

    def leaves_some(self, banned: set[int], drafts: Sequence[int] = ()) -> bool:
        """Whether a token is left that the grammar allows."""
        words = self.allowed_words(drafts)
        if words is None:
            return len(banned) < self._tokens.num_token_ids
        return bool((words & ~words_of(banned, len(words))).any())

    def give_up(self) -> None:
        """A mask takes too long, and another thread is at it yet."""
        self._fail("takes too long for a token")

    def _append_at_start(self, token_id: int) -> None:
        if self._thought is not None and token_id == self._thought.start_token_id:
            self._phase = "thought"
            self._matcher.reset()
        elif token_id in self._tokens.spaces and self._num_spaces < _MAX_SPACES:
            self._num_spaces += 1
            self._is_refused |= self._matcher.try_consume_tokens([token_id]) == 0
        else:
            self._phase = "form"
            self._consume(token_id)

    def _consume(self, token_id: int) -> None:
        if token_id not in self._stops:
            self._matcher.consume_token(token_id)
            self._check()

    def _words_after(self, drafts: tuple[int, ...]) -> Words | None:
        if self.failure is not None:
            return None
        if self._phase == "start":
            return self._words_after_start(drafts) if drafts else self._words_at_start()
        tail, rest = self._tail_after(drafts), drafts
        if self._phase == "thought" and self._thought is not None:
            if self._thought.end_token_id not in drafts:
                return self._unspelled(self._thought_words, tail)
            rest = drafts[drafts.index(self._thought.end_token_id) + 1 :]
        if self._stops.intersection(rest):
            return None  # the answer ends there
        return self._words_of_form(rest, tail, self._digits_after(drafts))

    def _words_after_start(self, drafts: tuple[int, ...]) -> Words | None:
        state = copy.copy(self)
        state._matcher, state._masks = self._matcher.deep_copy(), {}
        for token_id in drafts:
            state.append(token_id)
        return state.allowed_words()

    def _words_at_start(self) -> Words | None:
        words = np.zeros_like(self._tokens.all_words)
        if not self._is_refused:
            form = self._words_of_form((), self._tail, self._num_digits)
            if form is None:
                return None
            words = form
        if self._thought is not None and self._thought.start_token_id is not None:
            words = words | words_of((self._thought.start_token_id,), len(words))
        return words | self._tokens.space_words if self._num_spaces < _MAX_SPACES else words

    def _words_of_form(self, drafts: tuple[int, ...], tail: bytes, num_digits: int) -> Words | None:
        num_followed = self._matcher.try_consume_tokens(list(drafts)) if drafts else 0
        words = self._mask(tail) if num_followed == len(drafts) else None
        if words is not None and num_digits >= MAX_DIGITS:
            words = self._without_digits(words)
        if num_followed:
            self._matcher.rollback(num_followed)
        self._check()
        return words

    def _mask(self, tail: bytes) -> Words | None:
        words: Words = np.frombuffer(self._matcher.compute_bitmask(), dtype="<i4")
        words = self._unspelled(words[: self._tokens.num_words] & self._tokens.all_words, tail)
        if self._matcher.is_accepting():
            words = words | self._stop_words
        if not words.any():
            self._fail("allows no token of the vocabulary")
            return None
        return words

    def _unspelled(self, words: Words, tail: bytes) -> Words:
        return words if self._spelling is None else words & ~self._spelling.completing(tail)

    def _tail_after(self, token_ids: Sequence[int]) -> bytes:
        if self._spelling is None:
            return b""
        return self._spelling.tail_after(self._tail, map(self._tokens.bytes_of, token_ids))

    def _digits_after(self, token_ids: Sequence[int]) -> int:
        """Tokens of digits at the end, if these are added."""
        count = self._num_digits
        for token_id in token_ids:
            is_digit = self._numerals is not None and token_id in self._numerals.digits
            count = count + 1 if is_digit else 0
        return count

    def _without_digits(self, words: Words) -> Words:
        """As far as it is a number that may end here; in a string, digits may go on."""
        digits = self._tokens.digit_words
        if self._numerals is None or digits is None or has(words, self._numerals.letter):
            return words
        rest = words & ~digits
        return rest if rest.any() else words

    def _check(self) -> None:
        if self._matcher.is_error():
            self._fail(f"failed: {summary(self._matcher.get_error())}")

    def _fail(self, what: str) -> None:
        self.failure = f"its grammar ({self._grammar.parameter}) {what}"


def summary(error: str) -> str:
    """Of the library's errors, which quote a grammar whole: the first line, and that of the regex parser."""
    lines = error.strip().splitlines() or [""]
    return " ".join([lines[0], *(line for line in lines[1:] if line.startswith("error:"))])[:300]
