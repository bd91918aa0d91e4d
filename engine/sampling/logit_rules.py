"""What a request changes of its logits, as far as that depends on more than the step: its lists, and the
tokens that it has so far."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nybble.engine.grammar.grammar_state import GrammarState
from nybble.engine.grammar.token_words import words_of
from nybble.engine.messages import SamplingParams
from nybble.engine.sampling.thinking_limit import ThinkingLimit
from nybble.engine.sampling.token_counts import TokenCounts


@dataclass(frozen=True)
class ListedBias:
    """ids: int32 [N], distinct; values: float32 [N], -inf for a token that must not come."""

    ids: np.ndarray
    values: np.ndarray


class LogitRules:
    """A request's bias, penalties, allowed tokens, grammar, bad words, least length and thinking budget.

    `drafts` in its methods are tokens that are assumed to follow those appended.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        num_token_ids: int,
        grammar: GrammarState | None = None,
    ) -> None:
        """Ids from num_token_ids on are never sampled; stop tokens there are left out."""
        self._min_tokens = sampling.min_tokens
        self._num_output_tokens = 0
        self._stop_ids = {t for t in sampling.stop_token_ids if t < num_token_ids}
        self._bias = dict(sampling.logit_bias)
        self._bad_words = _BadWords(sampling.bad_words)
        self._candidates = None if sampling.allowed_token_ids is None else set(sampling.allowed_token_ids)
        self._num_token_ids = num_token_ids
        self._listed: tuple[set[int], ListedBias | None] = (set(), _listed(self._bias))
        self._listed_words = _allowed_words(sampling.allowed_token_ids, num_token_ids)
        self.grammar = grammar
        budget = sampling.thinking_budget
        self._thinking = None if budget is None else ThinkingLimit(budget, num_token_ids)
        self.counts = _counts(prompt_token_ids, sampling)
        self.penalties = (
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )

    def append(self, token_id: int) -> None:
        """The request has one more token of output."""
        self._num_output_tokens += 1
        self._bad_words.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)
        if self.grammar is not None:
            self.grammar.append(token_id)
        if self._thinking is not None:
            self._thinking.append(token_id)

    @property
    def failure(self) -> str | None:
        """Why what was sampled last must not be taken, if so."""
        return None if self.grammar is None else self.grammar.failure

    def allowed_words(self, drafts: Sequence[int] = ()) -> np.ndarray | None:
        """int32 [ceil(num_token_ids / 32)]: a bit for each token that may be next, the lowest first. None for
        all."""
        forced = self._end_of_thought(drafts)
        if forced is not None:
            return forced
        return self._listed_words if self.grammar is None else self.grammar.allowed_words(drafts)

    def bias(self, drafts: Sequence[int] = ()) -> ListedBias | None:
        """Of the next token. The same one is returned as long as nothing changes."""
        banned = self._banned(drafts)
        if banned != self._listed[0]:
            self._listed = banned, _listed(self._bias | dict.fromkeys(banned, -math.inf))
        return self._listed[1]

    def _banned(self, drafts: Sequence[int]) -> set[int]:
        """Tokens that must not come next. Bad words give way where they leave no token, and the least length
        where it leaves none that the grammar allows."""
        if self._end_of_thought(drafts) is not None:
            return set()
        is_short = self._num_output_tokens + len(drafts) < self._min_tokens
        stops = self._stop_ids if is_short else set[int]()
        if stops and self.grammar is not None and not self.grammar.leaves_some(stops, drafts):
            stops = set[int]()
        bad = self._bad_words.ends_after(drafts)
        if not bad:
            return stops
        return stops | bad if self._leaves_some(stops | bad, drafts) else stops

    def _end_of_thought(self, drafts: Sequence[int]) -> np.ndarray | None:
        return None if self._thinking is None else self._thinking.forced_words(drafts)

    def _leaves_some(self, banned: set[int], drafts: Sequence[int]) -> bool:
        if self.grammar is not None:
            return self.grammar.leaves_some(banned, drafts)
        if self._candidates is None:
            return len(banned) < self._num_token_ids
        return not self._candidates <= banned


def logit_rules(
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    num_token_ids: int,
    grammar: GrammarState | None = None,
) -> LogitRules | None:
    """A request's rules, or None if it changes nothing, so that it costs nothing."""
    has_rules = (
        sampling.min_tokens > 0
        or sampling.logit_bias
        or sampling.bad_words
        or sampling.allowed_token_ids is not None
        or _has_penalties(sampling)
        or grammar is not None
        or sampling.thinking_budget is not None
    )
    return LogitRules(prompt_token_ids, sampling, num_token_ids, grammar) if has_rules else None


class _BadWords:
    """Sequences of tokens that must not occur in an output."""

    def __init__(self, words: Iterable[Sequence[int]]) -> None:
        self._ends: dict[tuple[int, ...], set[int]] = {}  # all but the last token -> last tokens
        for word in words:
            self._ends.setdefault(tuple(word[:-1]), set()).add(word[-1])
        self._lengths = sorted({len(start) for start in self._ends})
        self._tail: deque[int] = deque(maxlen=max(self._lengths, default=0))

    def append(self, token_id: int) -> None:
        self._tail.append(token_id)

    def ends_after(self, drafts: Sequence[int]) -> set[int]:
        """Tokens that would complete a bad word."""
        if not self._ends:
            return set()
        tail = (*self._tail, *drafts)
        starts = (tail[len(tail) - length :] for length in self._lengths if length <= len(tail))
        return set().union(*(self._ends.get(start, ()) for start in starts))


def _has_penalties(sampling: SamplingParams) -> bool:
    is_on = sampling.presence_penalty or sampling.frequency_penalty
    return bool(is_on) or sampling.repetition_penalty != 1


def _counts(prompt_token_ids: Sequence[int], sampling: SamplingParams) -> TokenCounts | None:
    """The prompt's tokens matter to the repetition penalty only."""
    if not _has_penalties(sampling):
        return None
    return TokenCounts(prompt_token_ids if sampling.repetition_penalty != 1 else ())


def _listed(bias: dict[int, float]) -> ListedBias | None:
    if not bias:
        return None
    return ListedBias(np.array(list(bias), dtype=np.int32), np.array(list(bias.values()), dtype=np.float32))


def _allowed_words(token_ids: Sequence[int] | None, num_token_ids: int) -> np.ndarray | None:
    """int32 [ceil(num_token_ids / 32)]: a bit for each token, the lowest first."""
    if token_ids is None:
        return None
    return words_of(token_ids, -(-num_token_ids // 32))
