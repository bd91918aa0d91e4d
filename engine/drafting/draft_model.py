"""The draft (MTP) layer of a GLM checkpoint: guesses tokens ahead of the main model.

Row i stands for the token at position i and the one that follows it:

    x_i = projection [ norm(embedding of token i + 1) | norm(h_i) ]
    y_i = norm(decoder layer(x_i))          guesses token i + 2 by head(y_i)

h_i is the main model's hidden state of token i after its final norm. The layer has a KV cache of its own, in
which row i lies where the main model keeps token i. A guess further ahead is drafted from a guess: row i + 1
then takes the guessed token, and y_i in place of h_i.

Only distances between positions matter to rotary embeddings, so that row i may stand at position i.
"""

from __future__ import annotations

from typing import Generic

import torch
from torch import Tensor

from nybble.engine.model.model import Glm4Moe
from nybble.engine.model.weights import DraftWeights
from nybble.kernels.ops import AttentionBatch, KVCacheLayer, Ops, W


class DraftModel(Generic[W]):
    """A rank's part of the draft layer; `main` is its part of the main model, on one and the same stage."""

    def __init__(self, weights: DraftWeights[W], ops: Ops[W], main: Glm4Moe[W]) -> None:
        self._weights = weights
        self._ops = ops
        self._main = main

    def forward(
        self,
        next_token_ids: Tensor,
        hidden: Tensor,
        positions: Tensor,
        cache: KVCacheLayer,
        batch: AttentionBatch,
    ) -> tuple[Tensor, Tensor]:
        """Rows at positions int64 [T], from the tokens that follow them, int64 [T], and hidden [T, H].

        `hidden` is the main model's, normed, or what this returned for the row before. Writes keys and values
        to `cache`. Returns hidden states [T, H] for `logits`, and normed ones for the next row.
        """
        weights, ops = self._weights, self._ops
        embedded = self._main.embed_with(next_token_ids, weights.embedding)
        halves = ops.rms_norm(embedded, weights.embedding_norm), ops.rms_norm(hidden, weights.hidden_norm)
        projected = ops.linear(torch.cat(halves, dim=-1), weights.projection)
        output = self._main.run_layers(projected, positions, [(weights.layer, cache)], batch)
        return output, ops.rms_norm(output, weights.head.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [S, V] of the first result of `forward` [S, H], of this rank's share V."""
        head = self._weights.head
        return self._ops.logits(hidden, head.norm, head.matrix)
