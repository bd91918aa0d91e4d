"""The cache blocks of a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class BlockTable:
    """Block ids in the order of the tokens they hold; grows at its end."""

    def __init__(self) -> None:
        self._buffer = np.empty(16, dtype=np.int32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def array(self) -> NDArray[np.int32]:
        """int32 [len]; not a copy. It stays as it is when the table grows."""
        return self._buffer[: self._length]

    def extend(self, blocks: Sequence[int]) -> None:
        end = self._length + len(blocks)
        if end > len(self._buffer):
            grown = np.empty(max(end, 2 * len(self._buffer)), dtype=np.int32)
            grown[: self._length] = self.array
            self._buffer = grown
        self._buffer[self._length : end] = blocks
        self._length = end

    def tolist(self) -> list[int]:
        blocks: list[int] = self.array.tolist()
        return blocks
