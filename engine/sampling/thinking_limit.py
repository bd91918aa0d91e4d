"""Ends a thought that has used up its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from nybble.engine.grammar.token_words import Words, words_of

_MAX_LEAD = 3  # tokens before one that opens a thought: white space


class ThinkingBudget(Struct, frozen=True, kw_only=True):
    """After num_tokens tokens of a thought comes the first of end_token_ids, each of which ends it.

    start_token_id opens the thought, if it is among the first tokens; None where the prompt has opened it.
    """

    num_tokens: int
    end_token_ids: tuple[int, ...]
    start_token_id: int | None = None


class ThinkingLimit:
    """A budget and the output so far, which `append` is told one by one."""

    def __init__(self, budget: ThinkingBudget, num_token_ids: int) -> None:
        self._budget = budget
        self._end_words = words_of(budget.end_token_ids[:1], -(-num_token_ids // 32))
        self._num_before = 0  # tokens
        self._num_inside: int | None = 0 if budget.start_token_id is None else None
        self._is_over = False

    def append(self, token_id: int) -> None:
        """The output has one more token."""
        if self._is_over:
            return
        if self._num_inside is None:
            self._num_before += 1
            if token_id == self._budget.start_token_id:
                self._num_inside = 0
            self._is_over = self._num_inside is None and self._num_before >= _MAX_LEAD
        else:
            self._num_inside += 1
            self._is_over = token_id in self._budget.end_token_ids

    def forced_words(self, drafts: Sequence[int] = ()) -> Words | None:
        """The mask of the token after `drafts` (see `LogitRules`) where it must be the end; else None."""
        if self._is_over or not self._is_due_after(drafts):
            return None
        return self._end_words

    def _is_due_after(self, drafts: Sequence[int]) -> bool:
        num_inside = self._num_inside
        for number, token_id in enumerate(drafts, self._num_before + 1):
            if num_inside is not None:
                if token_id in self._budget.end_token_ids:
                    return False
                num_inside += 1
            elif token_id == self._budget.start_token_id:
                num_inside = 0
            elif number >= _MAX_LEAD:
                return False
        return num_inside is not None and num_inside >= self._budget.num_tokens
