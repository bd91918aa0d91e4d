"""Runs a step plan on the model."""

from __future__ import annotations

from typing import Generic

import torch

from nybble.engine.model import Glm4Moe
from nybble.engine.sampler import Sampler
from nybble.engine.step import SampledToken, StepPlan, build_step_input
from nybble.kernels.ops import KVCacheLayer, W


class ModelRunner(Generic[W]):
    def __init__(
        self,
        model: Glm4Moe[W],
        sampler: Sampler[W],
        kv_cache: tuple[KVCacheLayer, ...],
        device: torch.device,
    ) -> None:
        self._model = model
        self._sampler = sampler
        self._kv_cache = kv_cache
        self._block_size = kv_cache[0].keys.shape[1]
        self._device = device

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SampledToken]:
        """Compute the plan's tokens; returns the next token of each of its sampling chunks."""
        step = build_step_input(plan, self._block_size, self._device)
        hidden = self._model.forward(step.token_ids, step.positions, self._kv_cache, step.attention)
        if not plan.sampling_chunks:
            return []
        logits = self._model.logits(hidden[step.logit_rows])
        return self._sampler.sample(logits, plan.sampling_chunks)
