"""Prompts of a benchmark: random words, of which no two prompts begin alike, or all share a beginning.

The words are short and common: with most tokenizers each is one token, so that a few tries find how many
words make a prompt of the length that is asked for. What it really was is the server's to say.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from nybble.engine.errors import OptionError

_WORDS = """
the of and to in is was for that on with as his her by at from they not have one all this but
had were there been who would more when out them other time into only some could these two may
then do first any like my now over such our man me even most made after also did many before
must through years where much way
""".split()  # noqa: SIM905 (a list of literals would be one word a line)
MIN_UNIQUE_WORDS = 12  # of 69 words: 73 bits, so that no prompt is found in a prefix cache
_PROBE_WORDS = 256


@dataclass(frozen=True)
class Prompts:
    """num_shared_words of num_words are the same in all prompts of a run.

    nonce: random, so that a server that has been measured before knows none of them.
    """

    num_words: int
    num_shared_words: int
    seed: int
    nonce: str

    def text(self, number: int) -> str:
        shared = _words(f"{self.seed} {self.nonce}", self.num_shared_words)
        own = _words(f"{self.seed} {self.nonce} {number}", self.num_words - self.num_shared_words)
        return " ".join(shared + own)


def fit_prompts(
    num_tokens: int, num_shared_tokens: int, seed: int, nonce: str, count: Callable[[str], int]
) -> Prompts:
    """Prompts of as many tokens, of which about as many are shared; `count` asks the server for the length of
    one. The chat template's tokens count. Raises OptionError if no prompt is so short.
    """
    short = Prompts(MIN_UNIQUE_WORDS, 0, seed, f"{nonce} short")
    least = count(short.text(0))
    longer = Prompts(MIN_UNIQUE_WORDS + _PROBE_WORDS, 0, seed, f"{nonce} long")
    tokens_per_word = max((count(longer.text(0)) - least) / _PROBE_WORDS, 1e-3)
    num_unique = num_tokens - num_shared_tokens
    if num_unique < least:
        raise OptionError(
            f"prompt_tokens: {num_unique} tokens of a prompt are its own, expected at least {least}: the "
            f"chat template and {MIN_UNIQUE_WORDS} words, so that prompts differ"
        )
    num_shared = round(num_shared_tokens / tokens_per_word)
    num_words = MIN_UNIQUE_WORDS + round((num_tokens - least) / tokens_per_word)
    return Prompts(num_words, min(num_shared, num_words - MIN_UNIQUE_WORDS), seed, nonce)


def _words(seed: str, count: int) -> list[str]:
    return random.Random(seed).choices(_WORDS, k=count)
