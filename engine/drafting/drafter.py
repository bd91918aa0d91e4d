"""Guesses of tokens to come, made when a step's tokens are sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Protocol

from torch import Tensor

from nybble.engine.drafting.draft_step import DraftInput, pack, plan_drafts
from nybble.engine.ranks.rank_group import Announced, RankGroup
from nybble.engine.scheduling.step import SampledToken, StepPlan

Drafts = dict[str, tuple[int, ...]]  # of each request


class Drafter(Protocol):
    def draft(
        self, plan: StepPlan, sampled: Sequence[tuple[SampledToken, ...]], num_drafts: Mapping[str, int]
    ) -> Drafts:
        """Guess what follows the tokens that `plan` sampled, which are `sampled`.

        Called after every step, before its blocks are shared or freed. num_drafts: at most so many for each
        request; those that are not named get none.
        """


class DraftRank(Protocol):
    """What `Worker` is to rank 0."""

    def draft(self, inputs: DraftInput) -> Tensor:
        """Drafts int64 [S', most of a sequence] after the step that was run last."""


class ModelDrafter:
    """Drafts with the checkpoint's draft layer, on all ranks."""

    def __init__(
        self, worker: DraftRank, group: RankGroup, block_size: int, thread: Executor | None = None
    ) -> None:
        """`thread` is where steps are computed, if not in the caller's; so are drafts."""
        self._worker = worker
        self._group = group
        self._block_size = block_size
        self._thread = thread

    def draft(
        self, plan: StepPlan, sampled: Sequence[tuple[SampledToken, ...]], num_drafts: Mapping[str, int]
    ) -> Drafts:
        drafts = plan_drafts(plan, sampled, num_drafts, self._block_size)
        inputs, counts = drafts.inputs, drafts.inputs.num_drafts
        if self._thread is not None:
            guessed = self._thread.submit(self._guess, inputs).result()
        else:
            guessed = self._guess(inputs)
        rows = zip(drafts.request_ids, guessed, counts, strict=True)
        return {request_id: tuple(row[:count]) for request_id, row, count in rows}

    def _guess(self, inputs: DraftInput) -> list[list[int]]:
        if not self._group.is_alone:
            self._group.announce(Announced.DRAFT, pack(inputs))
        guessed: list[list[int]] = self._worker.draft(inputs).tolist()
        return guessed
