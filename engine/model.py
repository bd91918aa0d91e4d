"""GLM-4.x as a sequence of operations; how each is computed is the backend's business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from nybble.engine.model_config import ModelConfig
from nybble.engine.weights import ModelWeights
from nybble.kernels.ops import (
    AttentionBatch,
    DenseWeights,
    KVCacheLayer,
    MoeWeights,
    Ops,
    RotaryAngles,
    W,
)


class Glm4Moe(Generic[W]):
    """The main model: token ids in, hidden states and logits out."""

    def __init__(self, config: ModelConfig, weights: ModelWeights[W], ops: Ops[W]) -> None:
        self._weights = weights
        self._ops = ops
        device = weights.embedding.device
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device)
        # [rotary_dim / 2]
        self._inverse_frequencies = 1.0 / config.rope_theta ** (exponents / config.rotary_dim)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_cache: Sequence[KVCacheLayer],
        batch: AttentionBatch,
    ) -> Tensor:
        """Hidden states [T, H], before the final norm, of token_ids and positions int64 [T].

        Writes every token's keys and values to `kv_cache`, one entry a layer.
        """
        ops = self._ops
        hidden = ops.embed(token_ids, self._weights.embedding)
        angles = self._rotary_angles(positions, hidden.dtype)
        for layer, cache in zip(self._weights.layers, kv_cache, strict=True):
            query = ops.attention_input(hidden, layer.attention, angles, cache, batch.slots)
            attended = ops.paged_attention(query, cache, batch)
            hidden = ops.attention_output(attended, hidden, layer.attention)
            hidden = self._feed_forward(hidden, layer.feed_forward)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [S, V] of hidden [S, H]."""
        return self._ops.logits(hidden, self._weights.norm, self._weights.head)

    def _feed_forward(self, hidden: Tensor, weights: DenseWeights[W] | MoeWeights[W]) -> Tensor:
        if isinstance(weights, DenseWeights):
            return self._ops.dense_mlp(hidden, weights)
        return self._ops.moe(hidden, weights)

    def _rotary_angles(self, positions: Tensor, dtype: torch.dtype) -> RotaryAngles:
        # The angle is a float32 product and cos/sin are rounded after: so the model was trained.
        angles = positions.float().unsqueeze(-1) * self._inverse_frequencies
        return RotaryAngles(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype))
