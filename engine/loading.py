"""From options to a running engine: read, resolve, load."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble.engine.block_pool import BlockPool
from nybble.engine.checkpoint import Checkpoint
from nybble.engine.engine import Engine, EngineLimits
from nybble.engine.engine_config import EngineConfig, MemoryPlan, resolve
from nybble.engine.hardware import detect
from nybble.engine.kv_cache import allocate_kv_cache
from nybble.engine.messages import EngineReady
from nybble.engine.model import Glm4Moe
from nybble.engine.model_config import ModelConfig
from nybble.engine.model_runner import ModelRunner
from nybble.engine.parameters import expected_parameters
from nybble.engine.sampler import Sampler
from nybble.engine.scheduler import Scheduler
from nybble.engine.verify_checkpoint import check_structure
from nybble.engine.vocabulary import count_token_ids
from nybble.engine.weights import load_weights
from nybble.kernels.reference_ops import ReferenceOps


@dataclass(frozen=True)
class Preparation:
    """What can be known of an engine before its weights are read. `config` is resolved."""

    config: EngineConfig
    model_config: ModelConfig
    checkpoint: Checkpoint
    memory: MemoryPlan
    limits: EngineLimits

    def ready_message(self) -> EngineReady:
        return EngineReady(
            config=self.config,
            vocab_size=self.model_config.vocab_size,
            max_model_len=self.limits.max_model_len,
            eos_token_ids=self.model_config.eos_token_ids,
        )


def prepare(config: EngineConfig) -> Preparation:
    """Read config.json and the tensors' headers, and resolve the options.

    Raises:
        CheckpointError: the checkpoint is incomplete, malformed or of another architecture.
        OptionError: an option cannot be satisfied on this machine.
    """
    directory = Path(config.checkpoint)
    model_config, checkpoint = check_structure(directory)
    num_parameters = sum(math.prod(p.shape) for p in expected_parameters(model_config))
    resolved, memory = resolve(config, model_config, num_parameters, detect(config.device))
    limits = EngineLimits(
        max_model_len=resolved.max_model_len or model_config.max_position_embeddings,
        num_token_ids=count_token_ids(directory, model_config.vocab_size),
        block_size=resolved.cache.block_size,
    )
    return Preparation(resolved, model_config, checkpoint, memory, limits)


def load_engine(preparation: Preparation, on_layer: Callable[[int], None] = lambda layer: None) -> Engine:
    """Load the weights and build the engine; `on_layer` is told of each layer loaded."""
    config = preparation.config
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    ops = ReferenceOps(dtype)
    weights = load_weights(
        preparation.checkpoint,
        preparation.model_config,
        ops,
        device,
        dtype,
        weight_dtypes=config.weights,
        on_layer=on_layer,
    )
    geometry = preparation.memory.cache_geometry
    runner = ModelRunner(
        model=Glm4Moe(preparation.model_config, weights, ops),
        sampler=Sampler(ops, preparation.limits.num_token_ids),
        kv_cache=allocate_kv_cache(geometry, dtype, device),
        device=device,
    )
    scheduler = Scheduler(
        config.scheduler,
        BlockPool(geometry.num_blocks),
        geometry.block_size,
        config.cache.enable_prefix_caching,
    )
    return Engine(runner, scheduler, preparation.limits)
