"""GLM's mathematics in plain torch: what every other backend is compared with.

Weights are held dequantized in the activation dtype; sums over experts and all softmaxes are float32.
Rounding follows transformers' `Glm4Moe` where it has one answer: RMSNorm rounds before it multiplies
by its weight; the router works in float32 throughout. What a token's last bits may depend on is the
`Arithmetic`'s choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.arithmetic import PLAIN, Arithmetic
from nybble.kernels.logit_adjustments import LogitAdjustments, adjust_logits
from nybble.kernels.ops import (
    AttentionBatch,
    AttentionShape,
    AttentionWeights,
    DenseWeights,
    Embedding,
    KVCacheLayer,
    MlpWeights,
    MoeWeights,
    RmsNorm,
    RotaryAngles,
    RouterWeights,
    Routing,
    SamplingBatch,
)
from nybble.kernels.quantized_tensor import QuantizedTensor
from nybble.kernels.random_bits import gumbel
from nybble.kernels.token_logprobs import Logprobs, token_logprobs

_E4M3_MAX = 448.0


class ReferenceOps:
    """`Ops` whose weights are tensors of `dtype`. See `Ops` for every argument's shape."""

    def __init__(self, dtype: torch.dtype, arithmetic: Arithmetic = PLAIN) -> None:
        self.dtype = dtype
        self._arithmetic = arithmetic

    # What the model calls.

    def prepare_weight(self, weight: Tensor | QuantizedTensor) -> Tensor:
        if isinstance(weight, QuantizedTensor):
            return weight.dequantize(self.dtype)
        return weight.to(self.dtype)

    def prepare_router(self, router: RouterWeights) -> RouterWeights:
        return router

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCacheLayer:
        """keys, values: [num_blocks, block_size, num_kv_heads, D]."""
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        return KVCacheLayer(keys=keys, values=values)

    def embed(self, token_ids: Tensor, embedding: Embedding) -> Tensor:
        rows = token_ids - embedding.first_id
        is_elsewhere = (rows < 0) | (rows >= embedding.table.shape[0])
        found = F.embedding(rows.masked_fill(is_elsewhere, 0), embedding.table)
        return found.masked_fill(is_elsewhere.unsqueeze(-1), 0)

    def rotary_angles(self, table: RotaryAngles, positions: Tensor) -> RotaryAngles:
        return table.at(positions, self.dtype)

    def attention_input(
        self,
        hidden: Tensor,
        update: Tensor | None,
        weights: AttentionWeights[Tensor],
        angles: RotaryAngles,
        cache: KVCacheLayer,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        hidden = added(hidden, update)
        qkv = self._arithmetic.linear(rms_norm(hidden, weights.norm), weights.qkv, weights.qkv_bias)
        query, key, value = split_heads(qkv, weights.shape)
        query = rms_norm(query, weights.query_norm) if weights.query_norm else query
        key = rms_norm(key, weights.key_norm) if weights.key_norm else key
        store_kv(rotate(key, angles), value, cache, slots)
        return hidden, rotate(query, angles)

    def paged_attention(self, query: Tensor, cache: KVCacheLayer, batch: AttentionBatch) -> Tensor:
        outputs = []
        starts, lengths = batch.query_starts.tolist(), batch.context_lengths.tolist()
        for sequence, length in enumerate(lengths):
            keys, values = gather_context(cache, batch.block_tables[sequence], length, query.dtype)
            queries = query[starts[sequence] : starts[sequence + 1]]
            outputs.append(self._arithmetic.attention(queries, keys, values))
        return torch.cat(outputs).flatten(1)

    def attention_output(self, attended: Tensor, weights: AttentionWeights[Tensor]) -> Tensor:
        return self._arithmetic.linear(attended, weights.output)

    def dense_mlp(
        self, hidden: Tensor, update: Tensor | None, weights: DenseWeights[Tensor]
    ) -> tuple[Tensor, Tensor]:
        hidden = added(hidden, update)
        return hidden, mlp(rms_norm(hidden, weights.norm), weights.mlp, self._arithmetic)

    def moe(
        self, hidden: Tensor, update: Tensor | None, weights: MoeWeights[Tensor]
    ) -> tuple[Tensor, Tensor]:
        hidden = added(hidden, update)
        x = rms_norm(hidden, weights.norm)
        routing = route(x, weights.router, self._arithmetic)
        routed = experts(x, routing, weights.experts, weights.first_expert, self._arithmetic)
        shared = mlp(x, weights.shared_expert, self._arithmetic).float()
        return hidden, (routed + shared).to(hidden.dtype)

    def add(self, hidden: Tensor, update: Tensor) -> Tensor:
        return hidden + update

    def logits(self, hidden: Tensor, norm: RmsNorm, head: Tensor) -> Tensor:
        return self._arithmetic.linear(rms_norm(hidden, norm), head).float()

    def rms_norm(self, x: Tensor, norm: RmsNorm) -> Tensor:
        return rms_norm(x, norm)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._arithmetic.linear(x, weight)

    def adjust_logits(self, logits: Tensor, adjustments: LogitAdjustments) -> None:
        adjust_logits(logits, adjustments)

    def token_logprobs(self, logits: Tensor, token_ids: Tensor, num_token_ids: int, num_top: int) -> Logprobs:
        return token_logprobs(logits, token_ids, num_token_ids, num_top)

    def sample(self, logits: Tensor, batch: SamplingBatch, num_token_ids: int) -> Tensor:
        logits = logits[:, :num_token_ids]
        greedy = logits.argmax(dim=-1)
        if not batch.temperatures.any():
            return greedy
        drawn = self._arithmetic.by_rows(_draw, logits, *_columns(batch))
        return torch.where(batch.temperatures == 0, greedy, drawn)


# Norm, attention.


def added(hidden: Tensor, update: Tensor | None) -> Tensor:
    """hidden + update [T, H]."""
    return hidden if update is None else hidden + update


def rms_norm(x: Tensor, norm: RmsNorm) -> Tensor:
    """x [..., N] over its root mean square (float32, rounded to x's dtype), times the weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.eps)
    return normed.to(x.dtype) * norm.weight


def split_heads(qkv: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (num_heads + 2 num_kv_heads) * D] as query, key, value [T, heads, D]."""
    heads = torch.unflatten(qkv, -1, (-1, shape.head_dim))
    first_value = shape.num_heads + shape.num_kv_heads
    return heads[:, : shape.num_heads], heads[:, shape.num_heads : first_value], heads[:, first_value:]


def rotate(x: Tensor, angles: RotaryAngles) -> Tensor:
    """Rotate the first dimensions of x [T, heads, D], pairing i with i + rotary_dim / 2."""
    half = angles.cos.shape[-1]
    cos, sin = angles.cos.unsqueeze(1), angles.sin.unsqueeze(1)  # [T, 1, rotary_dim / 2]
    first, second, passed = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, passed), dim=-1)


def store_kv(key: Tensor, value: Tensor, cache: KVCacheLayer, slots: Tensor) -> None:
    """Write key and value [T, num_kv_heads, D] to the cache at slots [T]."""
    for stored, new, scale in (
        (cache.keys, key, cache.key_scale),
        (cache.values, value, cache.value_scale),
    ):
        if stored.dtype == torch.float8_e4m3fn:  # which torch can cast and not copy by index
            stored, new = stored.view(torch.uint8), to_fp8(new, scale).view(torch.uint8)
        stored.flatten(0, 1).index_copy_(0, slots, new.to(stored.dtype))


def to_fp8(x: Tensor, scale: Tensor | None) -> Tensor:
    """x over a scale, float32 [1] or None for 1, in E4M3; what is too large is the largest, 448."""
    wide = x.float() if scale is None else x.float() * scale.reciprocal()
    return wide.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def gather_context(
    cache: KVCacheLayer, block_table: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values that a block table [n] maps: `dtype` [length, num_kv_heads, D]."""
    block_size = cache.keys.shape[1]
    blocks = block_table[: -(-length // block_size)]
    keys, values = (stored[blocks].flatten(0, 1)[:length] for stored in (cache.keys, cache.values))
    return _unscaled(keys, cache.key_scale, dtype), _unscaled(values, cache.value_scale, dtype)


def _unscaled(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return stored.to(dtype) if scale is None else (stored.float() * scale).to(dtype)


# Feed-forward.


def mlp(x: Tensor, weights: MlpWeights[Tensor], arithmetic: Arithmetic = PLAIN) -> Tensor:
    """down(silu(gate(x)) * up(x)) of x [T, H]."""
    gate, up = arithmetic.linear(x, weights.gate_up).chunk(2, dim=-1)
    return arithmetic.linear(arithmetic.elementwise(F.silu, gate) * up, weights.down)


def route(x: Tensor, router: RouterWeights, arithmetic: Arithmetic = PLAIN) -> Routing:
    """Choose top_k experts for each row of x [T, H] by sigmoid score plus bias; weigh them by score."""
    logits = arithmetic.linear(x.float(), router.weight)
    scores = arithmetic.elementwise(torch.sigmoid, logits)  # [T, E]
    choice = _mask_weak_groups(scores + router.bias, router)
    ids = choice.topk(router.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if router.normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(ids=ids, weights=weights * router.scale)


def _mask_weak_groups(choice: Tensor, router: RouterWeights) -> Tensor:
    """-inf outside the top_k_groups groups whose two best entries of choice [T, E] sum highest."""
    if router.top_k_groups == router.num_groups:
        return choice
    grouped = torch.unflatten(choice, -1, (router.num_groups, -1))  # [T, groups, E / groups]
    strength = grouped.topk(2, dim=-1).values.sum(dim=-1)
    kept = strength.topk(router.top_k_groups, dim=-1, sorted=False).indices
    is_weak = torch.ones_like(strength, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(is_weak.unsqueeze(-1), -torch.inf).flatten(1)


def experts(
    x: Tensor,
    routing: Routing,
    weights: MlpWeights[Tensor],
    first_expert: int = 0,
    arithmetic: Arithmetic = PLAIN,
) -> Tensor:
    """float32 [T, H]: the weighted sum of each token's experts, added in the order of their ids.

    Of those that are not in the stacks, which hold first_expert and the following ones, nothing is added.
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    held = range(first_expert, first_expert + len(weights.gate_up))
    for expert in sorted(set(routing.ids.flatten().tolist()).intersection(held)):
        tokens, ranks = (routing.ids == expert).nonzero(as_tuple=True)
        row = expert - first_expert
        expert_weights = MlpWeights(weights.gate_up[row], weights.down[row])
        output = mlp(x[tokens], expert_weights, arithmetic).float()
        total.index_add_(0, tokens, output * routing.weights[tokens, ranks].unsqueeze(-1))
    return total


# Sampling.


def draw(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """int64 [S]: one token for each row, by its probability after temperature and filters (Gumbel-max)."""
    temperatures = batch.temperatures.masked_fill(batch.temperatures == 0, 1.0)
    shifted = logits - logits.amax(dim=-1, keepdim=True)  # so that a small temperature cannot overflow
    scaled = shifted / temperatures.unsqueeze(-1)
    if batch.min_ps.any() or batch.top_ks.any() or (batch.top_ps < 1).any():
        scaled = scaled.masked_fill(_excluded(scaled, batch), -torch.inf)
    return (scaled.double() + gumbel(batch.draws, logits.shape[-1])).argmax(dim=-1)


def _columns(batch: SamplingBatch) -> tuple[Tensor, ...]:
    return batch.temperatures, batch.top_ks, batch.top_ps, batch.min_ps, batch.draws


def _draw(logits: Tensor, *columns: Tensor) -> Tensor:
    return draw(logits, SamplingBatch(*columns))


def _excluded(scaled: Tensor, batch: SamplingBatch) -> Tensor:
    """bool [S, V]: what min_p, then top_k, then top_p drop."""
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1).double()
    excluded = probabilities < probabilities[:, :1] * batch.min_ps.unsqueeze(-1)
    ranks = torch.arange(probabilities.shape[-1], device=probabilities.device)
    top_ks = batch.top_ks.masked_fill(batch.top_ks == 0, probabilities.shape[-1])
    excluded |= ranks >= top_ks.unsqueeze(-1)
    kept = probabilities.masked_fill(excluded, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    mass_before = kept.cumsum(dim=-1) - kept
    top_ps = batch.top_ps.unsqueeze(-1)
    # The most likely token always stays, also for top_p 0.
    excluded |= (mass_before >= top_ps) & (top_ps < 1) & (ranks > 0)
    return torch.zeros_like(excluded).scatter_(1, ids, excluded)
