"""Runs a step plan on the model: all ranks compute, rank 0 samples."""

from __future__ import annotations

from typing import Generic, Protocol

import torch
from torch import Tensor

from nybble.engine.rank_group import RankGroup
from nybble.engine.sampler import Sampler
from nybble.engine.step import SampledToken, StepInput, StepPlan, build_step_input, pack
from nybble.kernels.ops import W


class StepWorker(Protocol):
    """What `Worker` is to rank 0."""

    def execute(self, step: StepInput) -> Tensor | None:
        """Logits float32 [S', V] of the step's `logit_rows`, if any."""


class ModelRunner(Generic[W]):
    """Rank 0's."""

    def __init__(self, worker: StepWorker, sampler: Sampler[W], group: RankGroup, block_size: int) -> None:
        self._worker = worker
        self._sampler = sampler
        self._group = group
        self._block_size = block_size

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[tuple[SampledToken, ...]]:
        """Compute the plan's tokens; returns the next tokens of each of its sampling chunks."""
        step = build_step_input(plan, self._block_size)
        if not self._group.is_alone:
            self._group.announce(pack(step))
        logits = self._worker.execute(step)
        return [] if logits is None else self._sampler.sample(logits, plan.sampling_chunks)
