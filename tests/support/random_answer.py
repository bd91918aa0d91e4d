"""Answers of a model that knows nothing: any token that a grammar allows."""

from __future__ import annotations

import random
from collections.abc import Collection

import numpy as np

from nybble.engine.grammar.grammar_state import GrammarState


class EndlessError(Exception):
    """The answer went on and on."""


def ids(words: np.ndarray) -> list[int]:
    """The tokens of a mask."""
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def random_answer(
    state: GrammarState,
    rng: random.Random,
    end: int,
    num_tokens: int,
    closing: Collection[int] = tuple(b'"]}'),
    weights: dict[int, int] | None = None,
) -> list[int]:
    """Up to the token `end`, which comes after num_tokens tokens as soon as it may.

    Past that, what is in `closing` comes first: an answer without an end says nothing. weights: tokens that
    are likelier than others, and by how much.
    """
    token_ids: list[int] = []
    while True:
        words = state.allowed_words()
        assert words is not None and state.failure is None, state.failure
        allowed = ids(words)
        is_late = len(token_ids) > num_tokens
        if end in allowed and (is_late or rng.random() < 0.3 or allowed == [end]):
            return token_ids
        likely = [token_id for token_id in closing if token_id in allowed]
        if not (is_late and likely and rng.random() < 0.8):
            likely = [token_id for token_id in allowed if token_id != end]
            likely += [t for t, weight in (weights or {}).items() if t in likely for _ in range(weight)]
        token_ids.append(rng.choice(likely))
        state.append(token_ids[-1])
        if len(token_ids) > 20 * num_tokens:
            raise EndlessError
