"""How often each token of a request occurs in its output, kept as it grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class TokenCounts:
    """Adding a token costs the same however many there are; the counts lie ready as arrays."""

    def __init__(self, prompt_token_ids: Sequence[int] = ()) -> None:
        """The prompt's tokens are listed with a count of 0."""
        self._ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int32))
        self._counts = np.zeros_like(self._ids)
        self._places = {token_id: place for place, token_id in enumerate(self._ids.tolist())}

    @property
    def ids(self) -> np.ndarray:
        """int32 [N]: distinct tokens of prompt and output. A view, valid until the next token."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """int32 [N]: how often each of `ids` is in the output. A view, valid until the next token."""
        return self._counts[: len(self._places)]

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._make_room()
        self._ids[place] = token_id
        self._counts[place] += 1

    def followed_by(self, token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """`ids` and `counts` as they would be after some more tokens."""
        extra, times = np.unique(np.asarray(token_ids, dtype=np.int32), return_counts=True)
        is_new = np.array([token_id not in self._places for token_id in extra.tolist()], dtype=bool)
        ids = np.concatenate((self.ids, extra[is_new]))
        counts = np.concatenate((self.counts, times[is_new].astype(np.int32)))
        known = [self._places[token_id] for token_id in extra[~is_new].tolist()]
        counts[known] += times[~is_new].astype(np.int32)
        return ids, counts

    def _make_room(self) -> None:
        more = np.zeros(max(len(self._ids), 16), dtype=np.int32)
        self._ids, self._counts = (np.concatenate((old, more)) for old in (self._ids, self._counts))
