"""Masks of tokens, bit by bit."""

from __future__ import annotations

import pytest

from nybble.engine.grammar.token_words import has, words_of


@pytest.mark.parametrize("token_ids", [[], [0], [31, 32], [5, 63, 64, 95], range(96)])
def test_a_bit_for_each_token(token_ids: list[int]) -> None:
    words = words_of(token_ids, 3)
    assert words.dtype == "int32" and words.shape == (3,)
    assert [t for t in range(96) if has(words, t)] == list(token_ids)
    assert [t for t in range(96) if int(words[t // 32]) & 0xFFFFFFFF & 1 << t % 32] == list(token_ids)
