"""Small random GLM checkpoints, and transformers' model of each as the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.modeling_layers import MtpModel

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
    """Write a random checkpoint to `directory`; returns transformers' model of it, float32.

    With num_mtp_layers=1 it has a draft layer, whose model `draft_oracle` reads.
    """
    config = Glm4MoeConfig(**(SIZES | overrides))
    torch.manual_seed(seed)
    model = Glm4MoeForCausalLM(config).float().eval()
    _randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, of the saving of a tiny model
        model.save_pretrained(directory)
    if config.num_mtp_layers:
        _add_draft_layer(directory, model)
    return model


def draft_oracle(directory: Path, main: Glm4MoeForCausalLM) -> MtpModel:
    """transformers' model of the draft layer in `directory`, read from its files, beside the main model."""
    main.config.name_or_path, main.config.dtype = str(directory), torch.float32
    # transformers knows the layer by the numbers that it has in published checkpoints.
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{main.config.num_hidden_layers}.*"]
    return MtpModel.from_pretrained(main).eval()


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


def make_predictable(directory: Path, seed: int = 0) -> None:
    """Change a checkpoint with a draft layer so that it guesses most of the main model's tokens.

    What follows a token depends mostly on that token alone; the draft layer passes it on, as does the main
    model, to the same norm and head.
    """
    tensors = load_file(directory / "model.safetensors")
    draft = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    prefix = f"model.layers.{draft}"
    for name in tensors:
        if name.endswith("embed_tokens.weight"):
            tensors[name] *= 8
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.1
    projection = tensors[f"{prefix}.eh_proj.weight"]
    width = len(projection)
    torch.manual_seed(seed)
    projection.normal_(0, 0.02)[:, :width] += torch.eye(width)
    tensors[f"{prefix}.shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _add_draft_layer(directory: Path, main: Glm4MoeForCausalLM) -> None:
    """Add one random draft layer to the file of a checkpoint, with copies of embedding and head."""
    model = MtpModel(main, 1).float()
    layer = model.layers[0]
    _randomize(layer)
    prefix = f"model.layers.{main.config.num_hidden_layers}"
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in layer.state_dict().items():
        name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        tensors |= {f"{prefix}.{n}": t.contiguous() for n, t in _as_in_files(name, tensor)}
    tensors[f"{prefix}.embed_tokens.weight"] = main.get_input_embeddings().weight.detach().clone()
    tensors[f"{prefix}.shared_head.head.weight"] = main.lm_head.weight.detach().clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _as_in_files(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor of a decoder layer under its name in checkpoints, where every expert has its own matrices."""
    stem, _, kind = name.rpartition(".")
    if not stem.endswith("experts") or kind not in ("gate_up_proj", "down_proj"):
        yield name, tensor
        return
    for expert, matrix in enumerate(tensor):
        if kind == "down_proj":
            yield f"{stem}.{expert}.down_proj.weight", matrix
            continue
        gate, up = matrix.chunk(2)
        yield f"{stem}.{expert}.gate_proj.weight", gate
        yield f"{stem}.{expert}.up_proj.weight", up


def _randomize(model: nn.Module) -> None:
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
