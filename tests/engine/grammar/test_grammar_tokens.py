"""What grammars know of a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer

from nybble.engine.grammar.grammar_tokens import GrammarTokens
from nybble.engine.grammar.token_words import has
from nybble.engine.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[GrammarTokens, Tokenizer]:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny_tokenizer(directory)
    return GrammarTokens(directory / "tokenizer.json"), tokenizer


def test_bytes_are_the_tokenizers_but_for_tags(both: tuple[GrammarTokens, Tokenizer]) -> None:
    tokens, tokenizer = both
    tags = {tokenizer.added_token_id(text) for text in ("<think>", "</think>", "<|user|>", "<|end|>")}
    for token_id in range(tokens.num_token_ids):
        assert tokenizer.has_token_id(token_id)
        is_added = token_id in tags or tokenizer.is_special(token_id)
        piece = b"" if is_added else tokenizer.token_bytes(token_id)
        assert tokens.bytes_of(token_id) == piece.replace(b"\xff", b"")  # its mark of tags
    assert not tokenizer.has_token_id(tokens.num_token_ids)


def test_white_space_and_digits(both: tuple[GrammarTokens, Tokenizer]) -> None:
    tokens, _ = both
    assert tokens.spaces == {9, 10, 13, 32}
    assert [t for t in range(tokens.num_token_ids) if has(tokens.space_words, t)] == [9, 10, 13, 32]
    assert tokens.numerals is not None and tokens.numerals.letter == ord("x")
    assert tokens.numerals.digits == set(b"0123456789")


def test_a_tag_may_be_completed_by_any_token_that_ends_it(both: tuple[GrammarTokens, Tokenizer]) -> None:
    tokens, tokenizer = both
    (think,) = tokenizer.encode("<think>")
    spelling = tokens.spelling((think,))
    assert spelling is tokens.spelling((think,))
    completing = spelling.completing(b"so <think")
    assert [t for t in range(tokens.num_token_ids) if has(completing, t)] == [ord(">")]
    assert not spelling.completing(b"<thin").any()
