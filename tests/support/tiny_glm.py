"""Small random GLM checkpoints, and transformers' model of each as the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "max_position_embeddings": 512,
    "num_mtp_layers": 0,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    "eos_token_id": 0,
}

# Each switches one thing that GLM-4.5 to 4.7 differ in, or that only a test can vary.
VARIANTS: dict[str, dict[str, Any]] = {
    "glm-4.7-like": {},
    "no-qk-norm": {"use_qk_norm": False},
    "no-bias": {"attention_bias": False},
    "all-sparse": {"first_k_dense_replace": 0},
    "all-dense": {"first_k_dense_replace": 3},
    "groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    "unnormalized": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "two-shared-experts": {"n_shared_experts": 2},
    "full-rotary": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 1.0,
        }
    },
    "tied": {"tie_word_embeddings": True},
}


def make_checkpoint(directory: Path, seed: int = 0, **overrides: Any) -> Glm4MoeForCausalLM:
    """Write a random checkpoint to `directory`; returns transformers' model of it, float32."""
    config = Glm4MoeConfig(**(SIZES | overrides))
    torch.manual_seed(seed)
    model = Glm4MoeForCausalLM(config).float().eval()
    _randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, of the saving of a tiny model
        model.save_pretrained(directory)
    return model


def greedy_tokens(model: Glm4MoeForCausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that transformers generates after `prompt`, stop tokens or not."""
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = generated[0, len(prompt) :].tolist()
    return tokens


def _randomize(model: Glm4MoeForCausalLM) -> None:
    """Weights large enough that every part moves the logits, and router biases that move choices."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.2)
            elif "norm" in name:
                tensor.normal_(1, 0.2)
            elif "bias" in name:
                tensor.normal_(0, 0.3)
            elif tensor.ndim >= 2:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
