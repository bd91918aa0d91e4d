"""GLM-4.x as a sequence of operations; how each is computed is the backend's business.

A rank runs its pipeline stage with its share of every layer. What is divided among the ranks of a stage comes
out as partial sums, which are added up in three places: after the embedding, attention and feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic

import torch
from torch import Tensor

from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.model.rotary import rotary_table
from nybble.engine.model.weights import HeadWeights, LayerWeights, ModelWeights
from nybble.kernels.ops import (
    AttentionBatch,
    DenseWeights,
    Embedding,
    KVCacheLayer,
    MoeWeights,
    Ops,
    W,
)


def _unchanged(partial: Tensor) -> Tensor:
    return partial


class Glm4Moe(Generic[W]):
    """A rank's part of the main model: token ids in, hidden states and logits out.

    all_reduce: adds up partial sums over the ranks of the stage; with one rank they are the sums.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights[W],
        ops: Ops[W],
        device: torch.device,
        all_reduce: Callable[[Tensor], Tensor] = _unchanged,
    ) -> None:
        self.ops = ops
        self._weights = weights
        self._all_reduce = all_reduce
        self._rotary_table = rotary_table(
            config.rope_theta, config.rotary_dim, config.max_position_embeddings, device
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states [T, H] of token_ids int64 [T]. On the first stage only."""
        if self._weights.embedding is None:
            raise ValueError("this pipeline stage does not hold the embedding")
        return self.embed_with(token_ids, self._weights.embedding)

    def embed_with(self, token_ids: Tensor, embedding: Embedding) -> Tensor:
        """[T, H]: the rows of token_ids int64 [T] in any embedding that is divided like the model's."""
        return self._all_reduce(self.ops.embed(token_ids, embedding))

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        kv_cache: Sequence[KVCacheLayer],
        batch: AttentionBatch,
    ) -> Tensor:
        """Run hidden states [T, H] of tokens at positions int64 [T] through the layers of this stage.

        Writes every token's keys and values to `kv_cache`, one entry a layer.
        """
        layers = zip(self._weights.layers, kv_cache, strict=True)
        return self.run_layers(hidden, positions, layers, batch)

    def run_layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        layers: Iterable[tuple[LayerWeights[W], KVCacheLayer]],
        batch: AttentionBatch,
    ) -> Tensor:
        """As `forward`, through any layers, each with its cache."""
        ops = self.ops
        angles = ops.rotary_angles(self._rotary_table, positions)
        update: Tensor | None = None
        for layer, cache in layers:
            hidden, query = ops.attention_input(hidden, update, layer.attention, angles, cache, batch.slots)
            attended = ops.paged_attention(query, cache, batch)
            update = self._all_reduce(ops.attention_output(attended, layer.attention))
            hidden, update = self._feed_forward(hidden, update, layer.feed_forward)
            update = self._all_reduce(update)
        return hidden if update is None else ops.add(hidden, update)

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm of hidden [T, H]. On the last stage only."""
        return self.ops.rms_norm(hidden, self._head().norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [S, V] of hidden [S, H], of this rank's share V of the vocabulary. On the last stage
        only."""
        head = self._head()
        return self.ops.logits(hidden, head.norm, head.matrix)

    def _head(self) -> HeadWeights[W]:
        if self._weights.head is None:
            raise ValueError("this pipeline stage does not hold the head")
        return self._weights.head

    def _feed_forward(
        self, hidden: Tensor, update: Tensor, weights: DenseWeights[W] | MoeWeights[W]
    ) -> tuple[Tensor, Tensor]:
        if isinstance(weights, DenseWeights):
            return self.ops.dense_mlp(hidden, update, weights)
        return self.ops.moe(hidden, update, weights)
