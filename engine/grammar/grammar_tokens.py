"""A checkpoint's tokens as grammars see them: bytes, white space, digits, and tags, which are no text."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from nybble.engine.grammar.spelling import Spelling
from nybble.engine.grammar.token_words import Words, words_of

_END = "<|end of grammar|>"
_SPACES = frozenset("\u0120\u010a\u010d\u0109")  # how byte-level tokens write space, line end and tab


class Numerals(NamedTuple):
    """digits: tokens of nothing but digits; letter: one that may come in a string and in no number."""

    digits: frozenset[int]
    letter: int


class GrammarTokens:
    """Of a tokenizer.json. May be used from several threads.

    matching: the library's, with one token more, its end of text. Added tokens are all special to it: no text
    has them, and grammars name them by id.
    """

    def __init__(self, path: Path) -> None:
        tokenizer = Tokenizer.from_file(str(path))
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.num_token_ids = max(self._vocabulary.values()) + 1
        self.num_words = -(-self.num_token_ids // 32)
        tokenizer.add_special_tokens([_END])
        added = tokenizer.get_added_tokens_decoder()
        self._tags: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        # Only added tokens have the key: that of a token of this name has a number.
        described = tokenizer.to_str().replace('"special":false', '"special":true')
        self.matching = LLTokenizer(described, eos_token=tokenizer.token_to_id(_END))
        self._spellings: dict[tuple[int, ...], Spelling] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text; nothing if it is an added one."""
        return b"" if token_id in self._tags else self.matching.decode_bytes([token_id])

    def spelling(self, token_ids: tuple[int, ...]) -> Spelling:
        """Of added tokens, at least one."""
        if token_ids not in self._spellings:
            tags = [self._tags[token_id] for token_id in token_ids]
            ends = {tag[-1] for tag in tags}
            ids = [token_id for text, token_id in self._vocabulary.items() if not ends.isdisjoint(text)]
            pieces = {token_id: self.bytes_of(token_id) for token_id in ids}
            encoded = [tag.encode() for tag in tags]
            self._spellings[token_ids] = Spelling(encoded, pieces, self.num_words)
        return self._spellings[token_ids]

    @cached_property
    def all_words(self) -> Words:
        return words_of(range(self.num_token_ids), self.num_words)

    @cached_property
    def spaces(self) -> frozenset[int]:
        """Tokens of nothing but white space."""
        return frozenset(token_id for text, token_id in self._vocabulary.items() if _SPACES.issuperset(text))

    @cached_property
    def space_words(self) -> Words:
        return words_of(self.spaces, self.num_words)

    @cached_property
    def numerals(self) -> Numerals | None:
        """None for a vocabulary without a letter of its own: numbers cannot be told from strings then."""
        letter = self._vocabulary.get("x")
        digits = frozenset(t for text, t in self._vocabulary.items() if text.isascii() and text.isdigit())
        return Numerals(digits, letter) if digits and letter is not None else None

    @cached_property
    def digit_words(self) -> Words | None:
        return None if self.numerals is None else words_of(self.numerals.digits, self.num_words)
