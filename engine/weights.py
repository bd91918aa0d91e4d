"""From checkpoint to model weights, one layer at a time.

Peak memory beyond the finished weights is twice one layer's experts as stored (one by one, and stacked)
and, for a backend that dequantizes, float32 copies of one matrix. Fused matrices (q/k/v, gate/up) are
joined row-wise, in FP4 without touching a code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from nybble.engine.checkpoint import Checkpoint
from nybble.engine.layouts import read_matrix
from nybble.engine.model_config import ModelConfig
from nybble.engine.parameters import check_tensors
from nybble.engine.weight_dtypes import WeightDtype, WeightDtypes, recast
from nybble.kernels import quantized_tensor
from nybble.kernels.ops import (
    AttentionShape,
    AttentionWeights,
    DenseWeights,
    MlpWeights,
    MoeWeights,
    Ops,
    RmsNorm,
    RouterWeights,
    W,
)
from nybble.kernels.quantized_tensor import QuantizedTensor

Stored = Tensor | QuantizedTensor


@dataclass(frozen=True)
class LayerWeights(Generic[W]):
    attention: AttentionWeights[W]
    feed_forward: DenseWeights[W] | MoeWeights[W]


@dataclass(frozen=True)
class ModelWeights(Generic[W]):
    """embedding: [V, H] in the activation dtype; head: [V, H] in the backend's form."""

    embedding: Tensor
    layers: tuple[LayerWeights[W], ...]
    norm: RmsNorm
    head: W


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    ops: Ops[W],
    device: torch.device,
    dtype: torch.dtype,
    weight_dtypes: WeightDtypes | None = None,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> ModelWeights[W]:
    """Load the main model for `ops`; `on_layer` is told after each layer.

    Raises:
        CheckpointError: as `check_tensors`, or a file cannot be read.
    """
    check_tensors(config, checkpoint.entries)
    loader = _Loader(checkpoint, config, ops, device, dtype, weight_dtypes or WeightDtypes())
    return loader.load(on_layer)


class _Loader(Generic[W]):
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        ops: Ops[W],
        device: torch.device,
        dtype: torch.dtype,
        weight_dtypes: WeightDtypes,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._ops = ops
        self._device = device
        self._dtype = dtype
        self._weight_dtypes = weight_dtypes

    def load(self, on_layer: Callable[[int], None]) -> ModelWeights[W]:
        embedding = self._vector("model.embed_tokens.weight")
        layers = []
        for layer in range(self._config.num_hidden_layers):
            layers.append(self._layer(layer))
            on_layer(layer)
        tied = self._config.tie_word_embeddings
        head: Stored = embedding if tied else self._stored("lm_head")
        return ModelWeights(
            embedding=embedding,
            layers=tuple(layers),
            norm=self._norm("model.norm"),
            head=self._ops.prepare_weight(head),
        )

    def _layer(self, layer: int) -> LayerWeights[W]:
        prefix = f"model.layers.{layer}"
        is_dense = self._config.is_dense_layer(layer)
        return LayerWeights(
            attention=self._attention(prefix),
            feed_forward=self._dense(prefix) if is_dense else self._moe(prefix),
        )

    def _attention(self, prefix: str) -> AttentionWeights[W]:
        config, attention = self._config, f"{prefix}.self_attn"
        dtype = self._weight_dtypes.attention_dtype
        projections = [f"{attention}.{name}_proj" for name in "qkv"]
        biases = [self._vector(f"{name}.bias") for name in projections if config.attention_bias]
        return AttentionWeights(
            shape=AttentionShape(
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                rotary_dim=config.rotary_dim,
            ),
            norm=self._norm(f"{prefix}.input_layernorm"),
            qkv=self._ops.prepare_weight(_join_rows([self._stored(name, dtype) for name in projections])),
            qkv_bias=torch.cat(biases) if biases else None,
            query_norm=self._norm(f"{attention}.q_norm") if config.use_qk_norm else None,
            key_norm=self._norm(f"{attention}.k_norm") if config.use_qk_norm else None,
            output=self._ops.prepare_weight(self._stored(f"{attention}.o_proj", dtype)),
        )

    def _dense(self, prefix: str) -> DenseWeights[W]:
        norm, dtype = self._norm(f"{prefix}.post_attention_layernorm"), self._weight_dtypes.dense_mlp_dtype
        return DenseWeights(norm=norm, mlp=self._mlp(f"{prefix}.mlp", dtype))

    def _moe(self, prefix: str) -> MoeWeights[W]:
        return MoeWeights(
            norm=self._norm(f"{prefix}.post_attention_layernorm"),
            router=self._router(f"{prefix}.mlp.gate"),
            experts=self._experts(f"{prefix}.mlp.experts"),
            shared_expert=self._mlp(f"{prefix}.mlp.shared_experts", self._weight_dtypes.shared_expert_dtype),
        )

    def _router(self, name: str) -> RouterWeights:
        config = self._config
        return RouterWeights(
            weight=self._read(f"{name}.weight").float(),
            bias=self._read(f"{name}.e_score_correction_bias").float(),
            top_k=config.num_experts_per_tok,
            num_groups=config.n_group,
            top_k_groups=config.topk_group,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )

    def _experts(self, prefix: str) -> MlpWeights[W]:
        names = [f"{prefix}.{expert}" for expert in range(self._config.n_routed_experts)]
        gate_up = _stack([self._gate_up(name) for name in names])
        down = _stack([self._stored(f"{name}.down_proj") for name in names])
        return MlpWeights(self._ops.prepare_weight(gate_up), self._ops.prepare_weight(down))

    def _mlp(self, name: str, dtype: WeightDtype) -> MlpWeights[W]:
        down = self._stored(f"{name}.down_proj", dtype)
        gate_up = self._gate_up(name, dtype)
        return MlpWeights(self._ops.prepare_weight(gate_up), self._ops.prepare_weight(down))

    def _gate_up(self, name: str, dtype: WeightDtype = "stored") -> Stored:
        return _join_rows([self._stored(f"{name}.{part}_proj", dtype) for part in ("gate", "up")])

    def _norm(self, name: str) -> RmsNorm:
        return RmsNorm(weight=self._vector(f"{name}.weight"), eps=self._config.rms_norm_eps)

    def _vector(self, name: str) -> Tensor:
        return self._read(name).to(self._dtype)

    def _stored(self, name: str, dtype: WeightDtype = "stored") -> Stored:
        """A linear layer's weight as the checkpoint stores it, or re-quantized."""
        return recast(read_matrix(self._checkpoint, name).to(self._device), dtype)

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(name).to(self._device)


def _join_rows(parts: Sequence[Stored]) -> Stored:
    quantized, floats = _by_kind(parts)
    return quantized_tensor.concatenate_rows(quantized) if quantized else torch.cat(floats)


def _stack(parts: Sequence[Stored]) -> Stored:
    quantized, floats = _by_kind(parts)
    return quantized_tensor.stack(quantized) if quantized else torch.stack(floats)


def _by_kind(parts: Sequence[Stored]) -> tuple[list[QuantizedTensor], list[Tensor]]:
    """`parts` if all are in one quantized format, else none; and all as floats: a mixture is dequantized."""
    quantized = [part for part in parts if isinstance(part, QuantizedTensor)]
    if len(quantized) == len(parts) and len({part.format for part in quantized}) == 1:
        return quantized, []
    return [], [p.dequantize() if isinstance(p, QuantizedTensor) else p for p in parts]
