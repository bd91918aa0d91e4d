"""Sets of tokens as masks: int32 [ceil(num_token_ids / 32)], a bit for each token, the lowest first."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]
_WORD = 32  # tokens in a word


def words_of(token_ids: Iterable[int], num_words: int) -> Words:
    is_in = np.zeros(num_words * _WORD, dtype=np.uint8)
    is_in[list(token_ids)] = 1
    return np.packbits(is_in, bitorder="little").view("<i4")


def has(words: Words, token_id: int) -> bool:
    return bool(words[token_id // _WORD] >> token_id % _WORD & 1)
