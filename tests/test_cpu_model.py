"""The model on the native CPU backend against transformers, over all that GLM-4.x checkpoints differ in; the
demo model's perplexity against the reference backend's.

Random weights are numbers that bfloat16 has, so that the backend holds them exactly where it is told to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chunked_logits import ChunkedLogits, chunked_logits, cut
from running import random_prompt
from tiny_glm import VARIANTS, make_checkpoint
from transformers import Glm4MoeForCausalLM

from nybble.engine.checkpoint.weight_dtypes import WeightDtypes
from nybble.engine.tokenizer import Tokenizer
from nybble.kernels.cpu.cpu_matrix import FloatForm
from nybble.kernels.cpu.cpu_ops import CpuOps
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.reference_ops import ReferenceOps

LICENSE = Path(__file__).parent.parent / "LICENSE"
Variant = tuple[Path, Glm4MoeForCausalLM]


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


def load(
    directory: Path, pool: Pool, form: FloatForm, kv_dtype: torch.dtype = torch.float32
) -> ChunkedLogits:
    return chunked_logits(directory, CpuOps(pool, form), torch.float32, kv_dtype)


@torch.inference_mode()
def test_logits_equal_transformers(variant: Variant, pool: Pool) -> None:
    directory, oracle = variant
    prompt = list(random_prompt(77, seed=2))
    expected = oracle(torch.tensor([prompt])).logits[0]
    actual = load(directory, pool, "bf16")([prompt])
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_logits_with_fp8_matrices_equal_the_reference(variant: Variant, pool: Pool) -> None:
    prompt = list(random_prompt(77, seed=4))
    dtypes = WeightDtypes(attention_dtype="fp8", dense_mlp_dtype="fp8", shared_expert_dtype="fp8")
    expected, actual = (
        chunked_logits(variant[0], ops, torch.float32, torch.float32, dtypes)([prompt])
        for ops in (ReferenceOps(torch.float32), CpuOps(pool, "bf16"))
    )
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_chunked_prefill_has_the_bits_of_the_whole(variant: Variant, pool: Pool) -> None:
    directory, _ = variant
    prompt = list(random_prompt(77, seed=3))
    logits = load(directory, pool, "int8", torch.bfloat16)
    whole = logits([prompt])
    for sizes in ([1] * 77, [16, 16, 45], [15, 17, 1, 44]):
        assert torch.equal(logits(cut(prompt, sizes)), whole)


def perplexity(logits: ChunkedLogits, token_ids: list[int]) -> float:
    found = logits(cut(token_ids, [128] * (len(token_ids) // 128)))
    return float(torch.nn.functional.cross_entropy(found[:-1].double(), torch.tensor(token_ids[1:])).exp())


@torch.inference_mode()
def test_the_demo_models_perplexity_is_the_references_within_a_hundredth(
    demo_checkpoint: Path, pool: Pool
) -> None:
    """As the engine runs it by default: int8 for what is not FP4, and a bf16 cache."""
    token_ids = Tokenizer(demo_checkpoint).encode(LICENSE.read_text())[:512]
    exact = chunked_logits(demo_checkpoint, ReferenceOps(torch.float32), torch.float32, torch.float32)
    expected = perplexity(exact, token_ids)
    assert 5 < expected < 30
    actual = perplexity(load(demo_checkpoint, pool, "int8", torch.bfloat16), token_ids)
    assert actual == pytest.approx(expected, rel=0.01)
