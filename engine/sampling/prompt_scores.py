"""Log-probabilities of a prompt's own tokens, found while its chunks are computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nybble.engine.messages import TokenLogprobs

MAX_SCORES_IN_STEP = 256
"""Each takes a row of logits as long as the vocabulary, of which the memory for a step must hold all."""


class PromptScores:
    """Of one request. Between steps, tokens [0, `num_scored`) are done; `num_top` likeliest come with each.

    A token's are read from the logits after the token before it: the first token has none. What is done stays
    so when the request is preempted and computed again.
    """

    def __init__(self, prompt_token_ids: Sequence[int], num_top: int) -> None:
        self.num_top = num_top
        self.num_scored = 1
        self._token_ids = prompt_token_ids
        self._new: list[TokenLogprobs] = []

    @property
    def is_complete(self) -> bool:
        return self.num_scored >= len(self._token_ids)

    def positions(self, start: int, end: int) -> range:
        """Those in [start, end) whose logits are needed for what is not done."""
        first = max(start, self.num_scored - 1)
        return range(first, max(min(end, len(self._token_ids) - 1), first))

    def following(self, positions: range) -> Sequence[int]:
        """The token after each of some positions."""
        return self._token_ids[positions.start + 1 : positions.stop + 1]

    def add(self, logprobs: Iterable[TokenLogprobs]) -> None:
        """Those of the next tokens."""
        before = len(self._new)
        self._new += logprobs
        self.num_scored += len(self._new) - before

    def take(self) -> tuple[TokenLogprobs, ...]:
        """What was added since this was last called."""
        new, self._new = tuple(self._new), []
        return new
