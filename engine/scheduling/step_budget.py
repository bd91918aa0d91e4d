"""A step while it is planned."""

from __future__ import annotations

from nybble.engine.sampling.prompt_scores import MAX_SCORES_IN_STEP
from nybble.engine.scheduling.sequence import Sequence


class StepBudget:
    """Tokens given to each sequence so far, and what is left of the budget.

    prompt_reserve: what decodes and drafts must leave of it.
    """

    def __init__(self, budget: int, prompt_reserve: int) -> None:
        self.left = budget
        self._scores_left = MAX_SCORES_IN_STEP
        self._prompt_reserve = prompt_reserve
        self.num_tokens: dict[Sequence, int] = {}
        self.num_drafts: dict[Sequence, int] = {}  # beyond those

    @property
    def left_for_decodes(self) -> int:
        return max(self.left - self._prompt_reserve, 0)

    def most_for(self, sequence: Sequence) -> int:
        """How many tokens of a prompt there is room for."""
        return min(self.left, self._scores_left) if sequence.is_scoring else self.left

    def add(self, sequence: Sequence, count: int) -> None:
        self._scores_left -= count if sequence.is_scoring else 0
        self.num_tokens[sequence] = self.num_tokens.get(sequence, 0) + count
        self.left -= count

    def add_drafts(self, sequence: Sequence, count: int) -> None:
        self.num_drafts[sequence] = count
        self.left -= count

    def remove(self, sequence: Sequence) -> None:
        self.left += self.num_tokens.pop(sequence, 0)
