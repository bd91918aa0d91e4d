"""A model that costs nothing, so that what an engine takes over it is the host's own work.

Scheduler, block pool, step building, sampling bookkeeping and events are those of any engine; only the
forward pass and the draw are left out.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from nybble.engine.engine import Engine, EngineLimits
from nybble.engine.engine_config import EngineConfig
from nybble.engine.model.model_runner import ModelRunner
from nybble.engine.planning.placement import Placement
from nybble.engine.ranks.rank_group import RankGroup
from nybble.engine.sampling.sampler import Sampler
from nybble.engine.scheduling.block_pool import BlockPool
from nybble.engine.scheduling.scheduler import Scheduler
from nybble.engine.scheduling.step import StepInput
from nybble.kernels.ops import SamplingBatch
from nybble.kernels.reference_ops import ReferenceOps

NULL_MODEL = "null"
VOCAB_SIZE = 151_552  # GLM-4.7's
MAX_MODEL_LEN = 202_752


class NullWorker:
    """Takes the place of `Worker`. Its logits are one row seen as many. A step takes `step_time` seconds,
    without work for the CPU."""

    def __init__(self, step_time: float = 0.0) -> None:
        self._row = torch.zeros(1, VOCAB_SIZE)
        self._step_time = step_time

    def execute(self, step: StepInput) -> Tensor | None:
        """float32 zeros [S', V], or None where nothing is sampled."""
        if self._step_time:
            time.sleep(self._step_time)
        num_rows = len(step.logit_rows)
        return self._row.expand(num_rows, -1) if num_rows else None

    def is_sound(self) -> bool:
        return True


class NullOps(ReferenceOps):
    """Picks the same token again and again, without a look at the logits."""

    def __init__(self, max_num_seqs: int, token_id: int = 0) -> None:
        super().__init__(torch.float32)
        self._token_ids = torch.full((max_num_seqs,), token_id)

    def sample(self, logits: Tensor, batch: SamplingBatch, num_token_ids: int) -> Tensor:
        return self._token_ids[: len(logits)]


def null_engine(config: EngineConfig, num_blocks: int, token_id: int = 0, step_time: float = 0.0) -> Engine:
    """An engine of one rank over the null model, with `num_blocks` blocks of cache that hold nothing."""
    block_size = config.cache.block_size
    limits = EngineLimits(
        max_model_len=config.max_model_len or MAX_MODEL_LEN, num_token_ids=VOCAB_SIZE, block_size=block_size
    )
    sampler = Sampler(NullOps(config.scheduler.max_num_seqs, token_id), VOCAB_SIZE)
    group = RankGroup(Placement())
    thread = ThreadPoolExecutor(1, "step") if step_time else None  # as where a step is real work
    runner = ModelRunner(NullWorker(step_time), sampler, group, block_size, thread)
    scheduler = Scheduler(
        config.scheduler, BlockPool(num_blocks), block_size, config.cache.enable_prefix_caching
    )
    return Engine(runner, scheduler, limits)
