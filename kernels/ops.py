"""The operations a backend implements, and the small values they exchange.

The model calls the five composite operations of a layer (`attention_input`, `paged_attention`,
`attention_output`, `dense_mlp`, `moe`) and `embed`, `rotary_angles`, `add` and `logits` around them; the
draft layer also `rms_norm` and `linear`; the sampler `adjust_logits`, `sample` and `token_logprobs`. A
backend may fuse a composite whole or build it from finer operations, as `ReferenceOps` does. Every
operation takes and returns tensors and the dataclasses below, never a model or a context.

Weights may be one rank's share of a model. Then `embed`, `attention_output`, `dense_mlp` and `moe` return
partial sums: added over the ranks, and to the hidden states, they are the model's. No operation communicates.
So what a part of a layer adds to the hidden states, its *update*, is added by the part that follows, together
with its norm: `attention_input`, `dense_mlp` and `moe` take both and return the sum, which may be
`hidden` itself, changed.

Shapes: T tokens in the step (of all sequences, one after the other), S sequences, H hidden size,
D head dim, V vocabulary. `W` is a backend's own form of a weight matrix. Heads, MLP widths, experts and
vocabulary are counted as the weights at hand have them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from nybble.kernels.logit_adjustments import LogitAdjustments
from nybble.kernels.quantized_tensor import QuantizedTensor
from nybble.kernels.token_logprobs import Logprobs

W = TypeVar("W")


@dataclass(frozen=True)
class RmsNorm:
    """weight [N] in the activation dtype."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Embedding:
    """table [V, H] in the activation dtype: the rows of token ids first_id .. first_id + V."""

    table: Tensor
    first_id: int = 0


@dataclass(frozen=True)
class AttentionShape:
    """Head geometry. `rotary_dim` leading dimensions of each head are rotated, the rest pass."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class AttentionWeights(Generic[W]):
    """qkv: [(num_heads + 2 num_kv_heads) * D, H], rows in the order q, k, v; qkv_bias: its bias or None;
    query_norm, key_norm: over D, or None; output: [H, num_heads * D], without bias."""

    shape: AttentionShape
    norm: RmsNorm
    qkv: W
    qkv_bias: Tensor | None
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    output: W


@dataclass(frozen=True)
class MlpWeights(Generic[W]):
    """gate_up: [2I, H], the I rows of gate above those of up; down: [H, I]."""

    gate_up: W
    down: W


@dataclass(frozen=True)
class DenseWeights(Generic[W]):
    """Feed-forward part of a dense layer."""

    norm: RmsNorm
    mlp: MlpWeights[W]


@dataclass(frozen=True)
class RouterWeights:
    """weight: float32 [E, H]; bias: float32 [E], used to choose experts and never to weigh them."""

    weight: Tensor
    bias: Tensor
    top_k: int
    num_groups: int
    top_k_groups: int
    normalize: bool
    scale: float


@dataclass(frozen=True)
class MoeWeights(Generic[W]):
    """Feed-forward part of a sparse layer.

    `experts` holds stacks of those from `first_expert` on: gate_up [E, 2I, H], down [E, H, I]. The router
    knows all of them.
    """

    norm: RmsNorm
    router: RouterWeights
    experts: MlpWeights[W]
    shared_expert: MlpWeights[W]
    first_expert: int = 0


@dataclass(frozen=True)
class Routing:
    """Of each token its experts and their weights: ids integer [T, top_k], weights float32 [T, top_k]."""

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class RotaryAngles:
    """cos, sin: [T, rotary_dim / 2] in the activation dtype."""

    cos: Tensor
    sin: Tensor

    def at(self, positions: Tensor, dtype: torch.dtype) -> RotaryAngles:
        """Of a table of all positions, the rows at positions int64 [T], rounded to `dtype`."""
        return RotaryAngles(cos=self.cos[positions].to(dtype), sin=self.sin[positions].to(dtype))


@dataclass(frozen=True)
class KVCacheLayer:
    """Paged keys (after norm and rotation) and values, in the layout of the backend that made it.

    key_scale, value_scale: float32 [1], by which what an FP8 cache holds is multiplied; None is 1. What lies
    beyond the largest code, 448 times the scale, is stored as that.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


@dataclass(frozen=True)
class AttentionBatch:
    """Which tokens of the step attend to which cache slots.

    query_starts: int32 [S + 1]; sequence s owns tokens query_starts[s] .. query_starts[s + 1]
    context_lengths: int32 [S]; tokens of sequence s in the cache, those of this step included
    block_tables: int32 [S, max_blocks]; the cache blocks of each sequence in order, padded with 0
    slots: int64 [T]; where each token's key and value go: block * block_size + offset
    query_lengths: the tokens of each sequence, for decisions on the host
    """

    query_starts: Tensor
    context_lengths: Tensor
    block_tables: Tensor
    slots: Tensor
    query_lengths: tuple[int, ...]


@dataclass(frozen=True)
class SamplingBatch:
    """How to pick one token from each row of logits.

    temperatures: float32 [S], 0 picks the most likely token; top_ks: int64 [S], 0 is off;
    top_ps, min_ps: float32 [S], 1 and 0 are off; draws: int64 [S], 64 random bits for each row, from
    which all its randomness is derived, so that a pick depends on nothing but its own row.
    """

    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    min_ps: Tensor
    draws: Tensor


class Ops(Protocol[W]):
    """A backend. Inputs lie on its device; activations have its activation dtype."""

    def prepare_weight(self, weight: Tensor | QuantizedTensor) -> W:
        """The backend's form of a matrix [N, K] or a stack [E, N, K]; called once for each weight."""

    def prepare_router(self, router: RouterWeights) -> RouterWeights:
        """The backend's form of a router; called once for each."""

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCacheLayer:
        """A layer's cache, uninitialised: unused host pages cost nothing.

        dtype: floats, or float8_e4m3fn with scales of 1, to be replaced before anything is stored.
        """

    def embed(self, token_ids: Tensor, embedding: Embedding) -> Tensor:
        """[T, H]: the rows of token_ids int64 [T], zeros for those that the table does not hold."""

    def rotary_angles(self, table: RotaryAngles, positions: Tensor) -> RotaryAngles:
        """Those of tokens at positions int64 [T], from a table of all positions [P, rotary_dim / 2], float32,
        rounded to the activation dtype."""

    def attention_input(
        self,
        hidden: Tensor,
        update: Tensor | None,
        weights: AttentionWeights[W],
        angles: RotaryAngles,
        cache: KVCacheLayer,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Norm, q/k/v projection, per-head norms and rotation of hidden + update [T, H].

        Writes keys and values to `cache` at `slots`; returns hidden + update and the queries
        [T, num_heads, D].
        """

    def paged_attention(self, query: Tensor, cache: KVCacheLayer, batch: AttentionBatch) -> Tensor:
        """Causal attention of query [T, num_heads, D] over each sequence's blocks, scaled by
        1 / sqrt(D): [T, num_heads * D]."""

    def attention_output(self, attended: Tensor, weights: AttentionWeights[W]) -> Tensor:
        """[T, H]: the output projection of attended [T, num_heads * D]."""

    def dense_mlp(
        self, hidden: Tensor, update: Tensor | None, weights: DenseWeights[W]
    ) -> tuple[Tensor, Tensor]:
        """hidden + update [T, H], and the MLP of its norm."""

    def moe(self, hidden: Tensor, update: Tensor | None, weights: MoeWeights[W]) -> tuple[Tensor, Tensor]:
        """hidden + update [T, H], and the routed and shared experts of its norm."""

    def add(self, hidden: Tensor, update: Tensor) -> Tensor:
        """hidden + update, both [T, H], which may be `hidden` itself, changed."""

    def logits(self, hidden: Tensor, norm: RmsNorm, head: W) -> Tensor:
        """float32 [S, V]: the head applied to the norm of hidden [S, H]."""

    def rms_norm(self, x: Tensor, norm: RmsNorm) -> Tensor:
        """[T, N]: the norm of x [T, N]."""

    def linear(self, x: Tensor, weight: W) -> Tensor:
        """[T, N]: x [T, K] times the transpose of a matrix [N, K]."""

    def adjust_logits(self, logits: Tensor, adjustments: LogitAdjustments) -> None:
        """Change logits, float32 [S, V], in place, as `logit_adjustments` says. Rows may lie apart."""

    def token_logprobs(self, logits: Tensor, token_ids: Tensor, num_token_ids: int, num_top: int) -> Logprobs:
        """Of token_ids, int64 [S], and the num_top likeliest tokens of each row: see `token_logprobs`."""

    def sample(self, logits: Tensor, batch: SamplingBatch, num_token_ids: int) -> Tensor:
        """int64 [S]: one token for each row of logits, float32 [S, V], of the first num_token_ids columns.

        In this order: divide by temperature, drop what min_p, top_k and top_p exclude, add Gumbel noise
        (`random_bits.gumbel`) and take the largest. So a rounding error in the logits changes a pick only
        where two tokens nearly tie, which inverting the cumulative distribution does not promise.
        """
