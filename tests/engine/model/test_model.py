"""The model against transformers' `Glm4MoeForCausalLM`, over all that GLM-4.x checkpoints differ in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chunked_logits import ChunkedLogits, chunked_logits, cut
from running import random_prompt, request, run, tiny_config, tiny_engine, tokens
from tiny_glm import SIZES, VARIANTS, greedy_tokens, make_checkpoint
from transformers import Glm4MoeForCausalLM

from nybble.kernels.reference_ops import ReferenceOps

Variant = tuple[Path, Glm4MoeForCausalLM]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    directory = tmp_path_factory.mktemp(request.param)
    return directory, make_checkpoint(directory, seed=1, **VARIANTS[request.param])


def load(
    directory: Path, dtype: torch.dtype = torch.float32, kv_dtype: torch.dtype | None = None
) -> ChunkedLogits:
    return chunked_logits(directory, ReferenceOps(dtype), dtype, kv_dtype or dtype)


@torch.inference_mode()
def test_logits_equal_transformers(variant: Variant) -> None:
    directory, oracle = variant
    prompt = list(random_prompt(77, seed=2))
    expected = oracle(torch.tensor([prompt])).logits[0]
    actual = load(directory)([prompt])
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_chunked_prefill_equals_whole(variant: Variant) -> None:
    directory, _ = variant
    prompt = list(random_prompt(77, seed=3))
    logits = load(directory)
    whole = logits([prompt])
    for sizes in ([1] * 77, [16, 16, 45], [15, 17, 1, 44]):
        assert (logits(cut(prompt, sizes)) - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_greedy_tokens_equal_transformers(variant: Variant) -> None:
    directory, oracle = variant
    prompt = random_prompt(37, seed=4)
    events = run(tiny_engine(tiny_config(directory)), request("a", prompt, max_tokens=64))
    assert tokens(events["a"]) == greedy_tokens(oracle, prompt, 64)


@torch.inference_mode()
def test_bfloat16_stays_close(tmp_path: Path) -> None:
    oracle = make_checkpoint(tmp_path, seed=5)
    prompt = list(random_prompt(50, seed=6))
    expected = oracle(torch.tensor([prompt])).logits[0]
    actual = load(tmp_path, torch.bfloat16)([prompt])
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < error < 0.1  # rounded, and no worse than bfloat16 explains


@torch.inference_mode()
def test_an_fp8_cache_stays_close(variant: Variant) -> None:
    """The median over tokens: where two experts nearly tie, rounding may choose the other one."""
    directory, _ = variant
    prompt = list(random_prompt(200, seed=9))
    expected = load(directory)([prompt])
    actual = load(directory, kv_dtype=torch.float8_e4m3fn)([prompt[:50], prompt[50:]])
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 5e-3 < errors.median() < 0.1
    assert (actual.argmax(-1) == expected.argmax(-1)).float().mean() > 0.8  # many logits nearly tie


@torch.inference_mode()
def test_position_matters_to_the_end_of_the_context(tmp_path: Path) -> None:
    """A context of 600 tokens against transformers: rotation is right far from position 0."""
    oracle = make_checkpoint(tmp_path, seed=7, max_position_embeddings=1024)
    prompt = list(random_prompt(600, seed=8))
    expected = oracle(torch.tensor([prompt])).logits[0, -1]
    actual = load(tmp_path)([prompt[:599], prompt[599:]])[-1]
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_sizes_exercise_what_glm_has() -> None:
    """The test model is worth something only if no two of its dimensions coincide by accident."""
    query, kv = (SIZES[name] * SIZES["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    assert query != kv
    assert SIZES["moe_intermediate_size"] != SIZES["intermediate_size"]
    assert SIZES["num_experts_per_tok"] < SIZES["n_routed_experts"]
