"""A checkpoint's model on any backend, one sequence at a time, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.weight_dtypes import WeightDtypes
from nybble.engine.messages import SamplingParams
from nybble.engine.model.kv_cache import CacheGeometry, allocate_kv_cache
from nybble.engine.model.model import Glm4Moe
from nybble.engine.model.weights import load_weights
from nybble.engine.planning.placement import Placement
from nybble.engine.scheduling.step import Chunk, StepPlan, build_step_input
from nybble.kernels.ops import Ops

_BLOCK_SIZE, _NUM_BLOCKS = 16, 40
_CPU = torch.device("cpu")

ChunkedLogits = Callable[[list[list[int]]], torch.Tensor]


def chunked_logits(
    directory: Path,
    ops: Ops[Any],
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    weight_dtypes: WeightDtypes | None = None,
) -> ChunkedLogits:
    """A function from chunks of one sequence to the logits of all its tokens, run chunk by chunk."""
    config = ModelConfig.from_directory(directory)
    weights = load_weights(Checkpoint.open(directory), config, ops, _CPU, dtype, weight_dtypes=weight_dtypes)
    model = Glm4Moe(config, weights, ops, _CPU)
    geometry = CacheGeometry.of(config, Placement(), kv_dtype, _BLOCK_SIZE, _NUM_BLOCKS)

    def logits(chunks: list[list[int]]) -> torch.Tensor:
        cache = allocate_kv_cache(geometry, ops, _CPU)
        for layer in cache:  # what was never written must never be read
            layer.keys.copy_(torch.full(layer.keys.shape, torch.nan))
            layer.values.copy_(torch.full(layer.values.shape, torch.nan))
        blocks = list(range(_NUM_BLOCKS - 1, -1, -1))
        outputs, start = [], 0
        for token_ids in chunks:
            chunk = Chunk("a", token_ids, start, blocks, SamplingParams(max_tokens=1))
            step = build_step_input(StepPlan((chunk,)), _BLOCK_SIZE)
            hidden = model.forward(model.embed(step.token_ids), step.positions, cache, step.attention)
            outputs.append(model.logits(hidden))
            start += len(token_ids)
        return torch.cat(outputs)

    return logits


def cut(prompt: list[int], sizes: Iterable[int]) -> list[list[int]]:
    """The prompt in pieces of these sizes."""
    pieces = []
    for size in sizes:
        pieces.append(prompt[:size])
        prompt = prompt[size:]
    return pieces
