"""The model on the native CPU backend against transformers, over all that GLM-4.x checkpoints differ in.

Weights are numbers that bfloat16 has, so that the backend holds them exactly where it is told to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from running import random_prompt
from tiny_glm import VARIANTS, make_checkpoint
from transformers import Glm4MoeForCausalLM

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.messages import SamplingParams
from nybble.engine.model.kv_cache import CacheGeometry, allocate_kv_cache
from nybble.engine.model.model import Glm4Moe
from nybble.engine.model.weights import load_weights
from nybble.engine.planning.placement import Placement
from nybble.engine.scheduling.step import Chunk, StepPlan, build_step_input
from nybble.kernels.cpu.cpu_matrix import FloatForm
from nybble.kernels.cpu.cpu_ops import CpuOps
from nybble.kernels.cpu.pool import Pool

BLOCK_SIZE = 16
CPU = torch.device("cpu")

Variant = tuple[Path, Glm4MoeForCausalLM]
Logits = Callable[[list[list[int]]], torch.Tensor]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    directory = tmp_path_factory.mktemp(request.param)
    model = make_checkpoint(directory, seed=1, **VARIANTS[request.param])
    for weight in model.parameters():
        weight.data.copy_(weight.data.bfloat16())
    model.save_pretrained(directory)
    return directory, model


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


def load(directory: Path, pool: Pool, form: FloatForm, kv_dtype: torch.dtype = torch.float32) -> Logits:
    """A function from chunks of one sequence to the logits of all its tokens, run chunk by chunk."""
    config, ops = ModelConfig.from_directory(directory), CpuOps(pool, form)
    weights = load_weights(Checkpoint.open(directory), config, ops, CPU, torch.float32)
    model = Glm4Moe(config, weights, ops, CPU)
    geometry = CacheGeometry.of(config, Placement(), kv_dtype, BLOCK_SIZE, num_blocks=40)

    def logits(chunks: list[list[int]]) -> torch.Tensor:
        cache = allocate_kv_cache(geometry, ops, CPU)
        for layer in cache:  # what was never written must never be read
            layer.keys.copy_(torch.full(layer.keys.shape, torch.nan))
            layer.values.copy_(torch.full(layer.values.shape, torch.nan))
        blocks = list(range(39, -1, -1))
        outputs, start = [], 0
        for token_ids in chunks:
            chunk = Chunk("a", token_ids, start, blocks, SamplingParams(max_tokens=1))
            step = build_step_input(StepPlan((chunk,)), BLOCK_SIZE)
            hidden = model.forward(model.embed(step.token_ids), step.positions, cache, step.attention)
            outputs.append(model.logits(hidden))
            start += len(token_ids)
        return torch.cat(outputs)

    return logits


@torch.inference_mode()
def test_logits_equal_transformers(variant: Variant, pool: Pool) -> None:
    directory, oracle = variant
    prompt = list(random_prompt(77, seed=2))
    expected = oracle(torch.tensor([prompt])).logits[0]
    actual = load(directory, pool, "bf16")([prompt])
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_chunked_prefill_has_the_bits_of_the_whole(variant: Variant, pool: Pool) -> None:
    directory, _ = variant
    prompt = list(random_prompt(77, seed=3))
    logits = load(directory, pool, "int8", torch.bfloat16)
    whole = logits([prompt])
    for sizes in ([1] * 77, [16, 16, 45], [15, 17, 1, 44]):
        pieces, rest = [], prompt
        for size in sizes:
            pieces.append(rest[:size])
            rest = rest[size:]
        assert torch.equal(logits(pieces), whole)
