"""Runs a step plan on the model: all ranks compute, rank 0 samples.

A step is launched, and its tokens are waited for later, so that the host can do other work meanwhile. On a
GPU a launch only queues what the device has to do, and waiting is the copy of the tokens that were drawn
(this has not run on one). A CPU has no queue: there a thread of its own computes, since torch lets go of the
interpreter in its operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, Protocol

import torch
from torch import Tensor

from nybble.engine.ranks.rank_group import Announced, RankGroup
from nybble.engine.sampling.sampler import Sampler
from nybble.engine.scheduling.step import (
    SampledToken,
    StepInput,
    StepPlan,
    build_step_input,
    logit_places,
    pack,
)
from nybble.kernels.ops import W

# Gives, for each sampling chunk of a plan, its tokens, once they are there.
Wait = Callable[[], Sequence[tuple[SampledToken, ...]]]


class StepWorker(Protocol):
    """What `Worker` is to rank 0."""

    def execute(self, step: StepInput) -> Tensor | None:
        """Logits float32 [S', V] of the step's `logit_rows`, if any."""

    def is_sound(self) -> bool:
        """Whether steps can still be executed, after one has failed."""


class ModelRunner(Generic[W]):
    """Rank 0's."""

    def __init__(
        self,
        worker: StepWorker,
        sampler: Sampler[W],
        group: RankGroup,
        block_size: int,
        thread: Executor | None = None,
    ) -> None:
        """`thread`, of one thread, is where steps are computed; without one that is the caller's."""
        self._worker = worker
        self._sampler = sampler
        self._group = group
        self._block_size = block_size
        self._thread = thread
        self._prepared: tuple[StepPlan, StepInput] | None = None

    def prepare(self, plan: StepPlan) -> None:
        """Flatten a plan of one token each that may be launched next, whose tokens are still to come."""
        self._prepared = plan, build_step_input(plan, self._block_size)

    def launch(self, plan: StepPlan) -> Wait:
        """Start computing a plan's tokens. One is launched at a time."""
        step = self._step_input(plan)
        if self._thread is not None:
            return self._thread.submit(lambda: self._compute(plan, step)()).result
        return self._compute(plan, step)

    def _step_input(self, plan: StepPlan) -> StepInput:
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared[0] is not plan:
            return build_step_input(plan, self._block_size)
        prepared[1].token_ids.numpy()[:] = [chunk.token_ids[0] for chunk in plan.chunks]
        return prepared[1]

    @torch.inference_mode()
    def _compute(self, plan: StepPlan, step: StepInput) -> Wait:
        if not self._group.is_alone:
            self._group.announce(Announced.STEP, pack(step))
        logits = self._worker.execute(step)
        if logits is None:
            return lambda: []
        if not plan.has_scores:
            return self._sampler.sample(logits, plan.sampling_chunks).tokens
        return self._score_and_sample(plan, logits)

    def _score_and_sample(self, plan: StepPlan, logits: Tensor) -> Wait:
        scored, sampled = logit_places(plan)
        scoring = self._sampler.score(logits[scored], plan.chunks) if scored else None
        draw = self._sampler.sample(logits[sampled], plan.sampling_chunks) if sampled else None

        def wait() -> Sequence[tuple[SampledToken, ...]]:
            if scoring is not None:
                scoring.settle()
            return [] if draw is None else draw.tokens()

        return wait

    def is_sound(self) -> bool:
        """Whether plans can still be run, after one has failed: other ranks may be left in its middle."""
        return self._group.is_alone and self._worker.is_sound()
