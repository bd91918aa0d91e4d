"""The reference against mathematics written again: float64, one token and one head at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeMLP,
    Glm4MoeMoE,
    Glm4MoeRMSNorm,
    Glm4MoeTopkRouter,
    apply_rotary_pos_emb,
)

from nybble.kernels import nvfp4
from nybble.kernels.arithmetic import PLAIN
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
from nybble.kernels.random_bits import draw_bits
from nybble.kernels.reference_ops import (
    ReferenceOps,
    experts,
    gather_context,
    mlp,
    rms_norm,
    rotate,
    route,
    store_kv,
)

FLOAT32 = {"max_error": 2e-5, "rms_error": 2e-6}
BFLOAT16 = {"max_error": 0.06, "rms_error": 0.008}  # a bfloat16 has 8 bits: 0.004 at most for one rounding
TOLERANCES = [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)]


def _normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * math.prod(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


# Norm and rotation.


def _rms_norm(x: Tensor, norm: RmsNorm) -> Tensor:
    wide = x.double()
    mean = (wide * wide).sum(-1, keepdim=True) / x.shape[-1]
    return wide / (mean + norm.eps).sqrt() * norm.weight.double()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (5, 3, 16), (2, 1000)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    x = _normal(*shape, scale=3, dtype=dtype)
    norm = RmsNorm(_normal(shape[-1], seed=1, dtype=dtype), eps=1e-5)
    actual = rms_norm(x, norm)
    assert actual.dtype == dtype
    assert_close(actual, _rms_norm(x, norm), **tolerance)


def test_rms_norm_of_tiny_values_is_held_by_eps() -> None:
    norm = RmsNorm(torch.ones(4), eps=1e-2)
    assert (rms_norm(torch.zeros(1, 4), norm) == 0).all()
    assert_close(rms_norm(torch.full((1, 4), 0.1), norm), torch.full((1, 4), 0.5**0.5), **FLOAT32)


def test_rms_norm_rounds_as_transformers_does() -> None:
    x, weight = _normal(9, 96, dtype=torch.bfloat16), _normal(96, seed=1, dtype=torch.bfloat16)
    theirs = Glm4MoeRMSNorm(96, eps=1e-5)
    theirs.weight.data = weight
    assert torch.equal(rms_norm(x, RmsNorm(weight, 1e-5)), theirs(x))


def _angles(positions: list[int], rotary_dim: int, dtype: torch.dtype = torch.float32) -> RotaryAngles:
    frequencies = 100.0 ** -(torch.arange(rotary_dim // 2).double() / (rotary_dim / 2))
    angles = torch.tensor(positions).double()[:, None] * frequencies
    return RotaryAngles(angles.cos().to(dtype), angles.sin().to(dtype))


def _rotate(x: Tensor, angles: RotaryAngles) -> Tensor:
    """As multiplication of the complex number x[i] + j x[i + half] with e^(j angle)."""
    half = angles.cos.shape[-1]
    wide = x.double()
    turned = torch.complex(wide[..., :half], wide[..., half : 2 * half])
    turned = turned * torch.complex(angles.cos.double(), angles.sin.double())[:, None]
    return torch.cat((turned.real, turned.imag, wide[..., 2 * half :]), -1)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (16, 16), (16, 8), (10, 6)])
def test_rotate(head_dim: int, rotary_dim: int, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    x, angles = _normal(4, 3, head_dim, dtype=dtype), _angles([0, 1, 7, 500], rotary_dim, dtype)
    actual = rotate(x, angles)
    assert actual.dtype == dtype
    assert torch.equal(actual[0], x[0])  # position 0
    assert torch.equal(actual[..., rotary_dim:], x[..., rotary_dim:])
    assert_close(actual, _rotate(x, angles), **tolerance)


def test_rotate_as_transformers_does() -> None:
    x, angles = _normal(4, 3, 16, dtype=torch.bfloat16), _angles([0, 1, 7, 500], 8, torch.bfloat16)
    cos, sin = torch.cat((angles.cos,) * 2, -1), torch.cat((angles.sin,) * 2, -1)
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert_close(rotate(x, angles), theirs, **BFLOAT16)


# Router.

ROUTERS = {
    "glm-4.7": RouterWeights(torch.empty(0), torch.empty(0), 3, 1, 1, True, 2.5),
    "one-expert": RouterWeights(torch.empty(0), torch.empty(0), 1, 1, 1, True, 2.5),
    "all-experts": RouterWeights(torch.empty(0), torch.empty(0), 12, 1, 1, True, 1.0),
    "unnormalized": RouterWeights(torch.empty(0), torch.empty(0), 3, 1, 1, False, 1.0),
    "groups": RouterWeights(torch.empty(0), torch.empty(0), 4, 4, 2, True, 2.5),
    "one-of-six-groups": RouterWeights(torch.empty(0), torch.empty(0), 2, 6, 1, True, 1.5),
    "all-groups": RouterWeights(torch.empty(0), torch.empty(0), 4, 4, 4, True, 2.5),
}
NUM_EXPERTS, HIDDEN = 12, 24


def _router(name: str, bias_scale: float = 0.3) -> RouterWeights:
    weight = _normal(NUM_EXPERTS, HIDDEN, scale=0.3)
    return replace(ROUTERS[name], weight=weight, bias=_normal(NUM_EXPERTS, scale=bias_scale))


def _dense(routing: Routing) -> Tensor:
    """[T, E] weights, 0 for experts that were not chosen; refuses an expert chosen twice."""
    assert all(len(set(ids)) == len(ids) for ids in routing.ids.tolist())
    dense = torch.zeros(len(routing.ids), NUM_EXPERTS, dtype=torch.float64)
    return dense.scatter(1, routing.ids, routing.weights.double())


def _route_one(x: Tensor, router: RouterWeights) -> dict[int, float]:
    """Expert -> weight of one token, with sorted lists of Python floats."""
    scores = [1 / (1 + math.exp(-(row.double() @ x.double()).item())) for row in router.weight]
    choice = [score + bias for score, bias in zip(scores, router.bias.tolist(), strict=True)]
    size = NUM_EXPERTS // router.num_groups
    groups = [range(first, first + size) for first in range(0, NUM_EXPERTS, size)]
    groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[: router.top_k_groups] for e in group]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: router.top_k]
    total = sum(scores[e] for e in chosen) if router.normalize else 1.0
    return {e: scores[e] / total * router.scale for e in chosen}


@pytest.mark.parametrize("name", ROUTERS)
def test_route_against_sorted_lists(name: str) -> None:
    x, router = _normal(40, HIDDEN), _router(name)
    routing = route(x, router)
    assert routing.ids.dtype == torch.int64
    assert routing.weights.dtype == torch.float32
    assert routing.ids.shape == routing.weights.shape == (40, router.top_k)
    expected = torch.zeros(40, NUM_EXPERTS, dtype=torch.float64)
    for token, weights in enumerate(_route_one(row, router) for row in x):
        for expert, weight in weights.items():
            expected[token, expert] = weight
    assert_close(_dense(routing), expected, **FLOAT32)


@pytest.mark.parametrize("name", ROUTERS)
def test_route_as_transformers_does(name: str) -> None:
    x, router = _normal(40, HIDDEN), _router(name)
    _, weights, ids = _their_router(router)(x)
    assert_close(_dense(route(x, router)), _dense(Routing(ids, weights)), **FLOAT32)


def test_bias_chooses_but_does_not_weigh() -> None:
    router = replace(_router("unnormalized"), bias=torch.zeros(NUM_EXPERTS), top_k=1)
    router.bias[7] = 5.0
    x = _normal(6, HIDDEN)
    routing = route(x, router)
    assert routing.ids.tolist() == [[7]] * 6
    assert_close(routing.weights[:, 0], (x @ router.weight[7]).sigmoid(), **FLOAT32)


def test_negative_choices_in_kept_groups_beat_weak_groups() -> None:
    """A mask of 0 instead of -inf would prefer an expert outside the kept groups."""
    router = replace(_router("one-of-six-groups"), bias=torch.full((NUM_EXPERTS,), -3.0))
    router.bias[4:6] = torch.tensor([-1.5, -1.6])
    assert set(route(_normal(20, HIDDEN), router).ids.flatten().tolist()) == {4, 5}


def test_router_works_in_float32_on_bfloat16_activations() -> None:
    x, router = _normal(40, HIDDEN, dtype=torch.bfloat16), _router("glm-4.7")
    assert torch.equal(route(x, router).weights, route(x.float(), router).weights)


def test_scores_that_vanish_do_not_divide_by_zero() -> None:
    router = replace(_router("glm-4.7"), weight=torch.full((NUM_EXPERTS, HIDDEN), -1e4))
    assert (route(torch.ones(2, HIDDEN), router).weights == 0).all()


def _their_config(router: RouterWeights, **sizes: object) -> Glm4MoeConfig:
    return Glm4MoeConfig(
        hidden_size=HIDDEN,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=router.top_k,
        n_group=router.num_groups,
        topk_group=router.top_k_groups,
        norm_topk_prob=router.normalize,
        routed_scaling_factor=router.scale,
        **sizes,
    )


def _their_router(router: RouterWeights) -> Glm4MoeTopkRouter:
    theirs = Glm4MoeTopkRouter(_their_config(router)).requires_grad_(False)
    theirs.weight.copy_(router.weight)
    theirs.e_score_correction_bias.copy_(router.bias)
    return theirs


# Feed-forward.


def _mlp(x: Tensor, weights: MlpWeights[Tensor]) -> Tensor:
    """One token in float64."""
    width = weights.down.shape[-1]
    gate = weights.gate_up[:width].double() @ x.double()
    up = weights.gate_up[width:].double() @ x.double()
    return weights.down.double() @ (gate / (1 + (-gate).exp()) * up)


def _mlp_weights(
    hidden: int, width: int, lead: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> MlpWeights[Tensor]:
    return MlpWeights(
        gate_up=_normal(*lead, 2 * width, hidden, scale=hidden**-0.5, dtype=dtype),
        down=_normal(*lead, hidden, width, seed=1, scale=width**-0.5, dtype=dtype),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("tokens", "hidden", "width"), [(1, 1, 1), (1, 24, 13), (7, 63, 100)])
def test_mlp(tokens: int, hidden: int, width: int, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    x, weights = _normal(tokens, hidden, dtype=dtype), _mlp_weights(hidden, width, dtype=dtype)
    expected = torch.stack([_mlp(row, weights) for row in x])
    assert_close(mlp(x, weights), expected, **tolerance)


def _experts(x: Tensor, routing: Routing, weights: MlpWeights[Tensor]) -> Tensor:
    total = torch.zeros(x.shape, dtype=torch.float64)
    for token, ids in enumerate(routing.ids.tolist()):
        for rank, expert in enumerate(ids):
            one = MlpWeights(weights.gate_up[expert], weights.down[expert])
            total[token] += routing.weights[token, rank].double() * _mlp(x[token], one)
    return total


def _random_routing(tokens: int, num_experts: int, top_k: int) -> Routing:
    ids = _normal(tokens, num_experts).argsort(dim=-1)[:, :top_k]
    return Routing(ids, _normal(tokens, top_k).abs())


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "num_experts", "top_k"),
    [(1, 24, 13, 7, 3), (9, 63, 31, 5, 2), (20, 16, 8, 3, 3), (2, 16, 8, 40, 1)],
)
def test_experts(
    tokens: int,
    hidden: int,
    width: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    tolerance: dict[str, float],
) -> None:
    x, weights = _normal(tokens, hidden, dtype=dtype), _mlp_weights(hidden, width, (num_experts,), dtype)
    routing = _random_routing(tokens, num_experts, top_k)
    actual = experts(x, routing, weights)
    assert actual.dtype == torch.float32
    assert_close(actual, _experts(x, routing, weights), **tolerance)


def test_all_tokens_on_one_expert() -> None:
    x, weights = _normal(11, 24), _mlp_weights(24, 13, (4,))
    routing = Routing(torch.full((11, 1), 2), _normal(11, 1))
    assert_close(experts(x, routing, weights), _experts(x, routing, weights), **FLOAT32)


def test_experts_that_are_not_chosen_are_not_read() -> None:
    x, weights = _normal(5, 24), _mlp_weights(24, 13, (4,))
    weights.gate_up[1], weights.down[3] = torch.nan, torch.nan
    routing = Routing(torch.tensor([[0, 2]] * 5), torch.ones(5, 2))
    assert_close(experts(x, routing, weights), _experts(x, routing, weights), **FLOAT32)


def _moe_weights(router: RouterWeights) -> MoeWeights[Tensor]:
    return MoeWeights(
        norm=RmsNorm(_normal(HIDDEN), 1e-5),
        router=router,
        experts=_mlp_weights(HIDDEN, 10, (NUM_EXPERTS,)),
        shared_expert=_mlp_weights(HIDDEN, 20),
    )


@pytest.mark.parametrize("name", ["glm-4.7", "groups", "unnormalized"])
def test_moe_as_transformers_does(name: str) -> None:
    weights, hidden = _moe_weights(_router(name)), _normal(15, HIDDEN, scale=2)
    config = _their_config(weights.router, moe_intermediate_size=10, n_shared_experts=2)
    theirs = Glm4MoeMoE(config).requires_grad_(False)
    theirs.gate = _their_router(weights.router)
    theirs.experts.gate_up_proj.copy_(weights.experts.gate_up)
    theirs.experts.down_proj.copy_(weights.experts.down)
    _fill(theirs.shared_experts, weights.shared_expert)
    norm = Glm4MoeRMSNorm(HIDDEN, 1e-5).requires_grad_(False)
    norm.weight.copy_(weights.norm.weight)
    expected = theirs(norm(hidden).unsqueeze(0)).squeeze(0)
    assert_close(ReferenceOps(torch.float32).moe(hidden, None, weights)[1], expected, **FLOAT32)


def test_an_update_is_added_before_the_norm() -> None:
    weights = DenseWeights(RmsNorm(_normal(24), 1e-5), _mlp_weights(24, 50))
    hidden, update, ops = _normal(5, 24), _normal(5, 24), ReferenceOps(torch.float32)
    total, added = ops.dense_mlp(hidden, update, weights)
    assert torch.equal(total, hidden + update)
    assert torch.equal(added, ops.dense_mlp(hidden + update, None, weights)[1])


def test_dense_mlp_is_the_mlp_of_the_norm() -> None:
    weights = DenseWeights(RmsNorm(_normal(24), 1e-5), _mlp_weights(24, 50))
    hidden = _normal(5, 24, scale=2)
    expected = torch.stack([_mlp(row, weights.mlp) for row in _rms_norm(hidden, weights.norm)])
    assert_close(ReferenceOps(torch.float32).dense_mlp(hidden, None, weights)[1], expected, **FLOAT32)


# Shares of the ranks: partial sums add up to the whole.


def _neurons(weights: MlpWeights[Tensor], first: int, last: int) -> MlpWeights[Tensor]:
    """Those from `first` to before `last` of an MLP, or of each of a stack."""
    gate, up = weights.gate_up.chunk(2, dim=-2)
    gate_up = torch.cat((gate[..., first:last, :], up[..., first:last, :]), dim=-2)
    return MlpWeights(gate_up, weights.down[..., first:last])


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_dense_mlps_of_the_ranks_add_up(dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    weights = DenseWeights(RmsNorm(_normal(24, dtype=dtype), 1e-5), _mlp_weights(24, 50, dtype=dtype))
    hidden, ops = _normal(5, 24, scale=2, dtype=dtype), ReferenceOps(dtype)
    shares = [replace(weights, mlp=_neurons(weights.mlp, *span)) for span in ((0, 10), (10, 11), (11, 50))]
    total = sum((ops.dense_mlp(hidden, None, share)[1].double() for share in shares), torch.zeros(5, 24))
    assert_close(total, ops.dense_mlp(hidden, None, weights)[1], **tolerance)


def test_experts_of_the_ranks_add_up() -> None:
    """The third share is of experts that no token chose."""
    x, weights = _normal(9, 24), _mlp_weights(24, 13, (6,))
    routing = Routing(torch.tensor([[0, 3], [1, 0], [3, 2]] * 3), _normal(9, 2))
    total = torch.zeros(9, 24)
    for first, last in ((0, 1), (1, 4), (4, 6)):
        share = MlpWeights(weights.gate_up[first:last], weights.down[first:last])
        total += experts(x, routing, share, first_expert=first)
    assert_close(total, _experts(x, routing, weights), **FLOAT32)


def test_experts_of_other_ranks_add_nothing() -> None:
    x, weights = _normal(4, 24), _mlp_weights(24, 13, (2,))
    routing = Routing(torch.tensor([[0, 1], [4, 5]] * 2), torch.ones(4, 2))
    assert not experts(x, routing, weights, first_expert=2).any()


@pytest.mark.parametrize("name", ["glm-4.7", "groups", "unnormalized"])
@pytest.mark.parametrize("has_whole_experts", [True, False])
def test_moes_of_the_ranks_add_up(has_whole_experts: bool, name: str) -> None:
    """Every rank routes alike, over all experts, and has a share of the shared expert."""
    weights, hidden = _moe_weights(_router(name)), _normal(15, HIDDEN, scale=2)
    total, ops = torch.zeros(15, HIDDEN), ReferenceOps(torch.float32)
    for rank in range(2):
        first = rank * NUM_EXPERTS // 2 if has_whole_experts else 0
        whole, half = weights.experts, slice(first, first + NUM_EXPERTS // 2)
        share = replace(
            weights,
            experts=MlpWeights(whole.gate_up[half], whole.down[half])
            if has_whole_experts
            else _neurons(whole, 5 * rank, 5 * rank + 5),
            shared_expert=_neurons(weights.shared_expert, 10 * rank, 10 * rank + 10),
            first_expert=first,
        )
        total += ops.moe(hidden, None, share)[1]
    assert_close(total, ops.moe(hidden, None, weights)[1], **FLOAT32)


def _fill(theirs: Glm4MoeMLP, weights: MlpWeights[Tensor]) -> None:
    gate, up = weights.gate_up.chunk(2)
    for layer, weight in ((theirs.gate_proj, gate), (theirs.up_proj, up), (theirs.down_proj, weights.down)):
        layer.weight.copy_(weight)


# Attention.

BLOCK_SIZE = 16


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """float64 [t, heads, D]: query token i of t sees the first n - t + i + 1 of n keys."""
    (tokens, heads, dim), (context, kv_heads, _) = query.shape, keys.shape
    result = torch.empty(query.shape, dtype=torch.float64)
    for token in range(tokens):
        seen = context - tokens + token + 1
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = keys[:seen, kv].double() @ query[token, head].double() / math.sqrt(dim)
            weights = (scores - scores.max()).exp()
            result[token, head] = weights / weights.sum() @ values[:seen, kv].double()
    return result


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 17), (5, 5), (4, 33)])
def test_causal_attention(
    tokens: int, context: int, heads: int, kv_heads: int, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    query = _normal(tokens, heads, 8, scale=3, dtype=dtype)
    keys, values = (_normal(context, kv_heads, 8, seed=seed, dtype=dtype) for seed in (1, 2))
    assert_close(PLAIN.attention(query, keys, values), _attend(query, keys, values), **tolerance)


def test_the_future_is_not_read() -> None:
    query, keys, values = _normal(3, 2, 8), _normal(9, 2, 8, seed=1), _normal(9, 2, 8, seed=2)
    first = PLAIN.attention(query, keys, values)
    keys[7:], values[7:] = 100.0, -100.0
    assert torch.equal(PLAIN.attention(query, keys, values)[0], first[0])


def _paged(
    spans: list[tuple[int, int]], kv_heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[KVCacheLayer, AttentionBatch, list[tuple[Tensor, Tensor]]]:
    """A cache of NaN that holds contexts of random keys and values in shuffled blocks.

    spans: of each sequence its query tokens and its context. Returns the contexts too.
    """
    counts = [-(-context // BLOCK_SIZE) for _, context in spans]
    num_blocks = sum(counts) + 3
    # Block 0, which pads the tables, belongs to nobody.
    free = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(5)) + 1).tolist()
    shape = (num_blocks, BLOCK_SIZE, kv_heads, dim)
    cache = KVCacheLayer(*(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)))
    tables = torch.zeros(len(spans), max(counts), dtype=torch.int32)
    contexts, slots = [], []
    for row, ((tokens, context), count) in enumerate(zip(spans, counts, strict=True)):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        parts = tuple(_normal(context, kv_heads, dim, seed=2 * row + part, dtype=dtype) for part in range(2))
        for position in range(context):
            block, offset = tables[row, position // BLOCK_SIZE], position % BLOCK_SIZE
            cache.keys[block, offset], cache.values[block, offset] = (part[position] for part in parts)
            if position >= context - tokens:
                slots.append(int(block) * BLOCK_SIZE + offset)
        contexts.append((parts[0], parts[1]))
    starts = np.cumsum([0] + [tokens for tokens, _ in spans])
    batch = AttentionBatch(
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lengths=torch.tensor([context for _, context in spans], dtype=torch.int32),
        block_tables=tables,
        slots=torch.tensor(slots),
        query_lengths=tuple(tokens for tokens, _ in spans),
    )
    return cache, batch, contexts


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    "spans",
    [
        *([(1, n)] for n in (1, 15, 16, 17, 33)),
        *([(n, n)] for n in (2, 15, 16, 17, 33)),
        [(1, 33), (1, 1), (7, 20), (17, 17), (1, 16), (16, 48)],
    ],
    ids=str,
)
def test_paged_attention_in_a_poisoned_cache(
    spans: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    tolerance: dict[str, float],
) -> None:
    cache, batch, contexts = _paged(spans, kv_heads, 8, dtype)
    query = _normal(sum(tokens for tokens, _ in spans), heads, 8, scale=2, dtype=dtype)
    parts = query.split([tokens for tokens, _ in spans])
    expected = [_attend(part, *context).flatten(1) for part, context in zip(parts, contexts, strict=True)]
    actual = ReferenceOps(dtype).paged_attention(query, cache, batch)
    assert actual.dtype == dtype
    assert_close(actual, torch.cat(expected), **tolerance)


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(("key_scale", "value_scale"), [(None, None), (0.02, 0.5), (3.0, 1e-3)])
def test_an_fp8_cache_holds_the_nearest_code(key_scale: float | None, value_scale: float | None) -> None:
    """Codes and the way back, over every finite E4M3 number and the middles between them."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    codes = codes[codes.isfinite()].unique()
    numbers = torch.cat((codes, (codes[1:] + codes[:-1]) / 2 * 1.001))
    numbers = F.pad(numbers, (0, -len(numbers) % 8)).view(-1, 1, 8)
    cache = KVCacheLayer(
        *(torch.empty(len(numbers), 1, 1, 8, dtype=FP8) for _ in range(2)),
        *(None if scale is None else torch.tensor([scale]) for scale in (key_scale, value_scale)),
    )
    scales = [1.0 if scale is None else scale for scale in (key_scale, value_scale)]
    store_kv(numbers * scales[0], numbers * scales[1], cache, torch.arange(len(numbers)))
    table = torch.arange(len(numbers))
    for found, scale in zip(gather_context(cache, table, len(numbers), torch.float32), scales, strict=True):
        nearest = (numbers[..., None].double() - codes.double()).abs().min(dim=-1).values
        error = (found.double() / scale - numbers.double()).abs()
        assert (error <= nearest + 1e-6 * numbers.abs()).all()


def test_an_fp8_cache_saturates() -> None:
    cache = KVCacheLayer(
        torch.empty(1, 2, 1, 2, dtype=FP8), torch.empty(1, 2, 1, 2, dtype=FP8), None, torch.tensor([0.5])
    )
    large = torch.tensor([[[449.0, -1e30]], [[torch.inf, 460.0]]])
    store_kv(large, large, cache, torch.tensor([0, 1]))
    keys, values = gather_context(cache, torch.tensor([0]), 2, torch.float32)
    assert keys.flatten().tolist() == [448, -448, 448, 448]
    assert values.flatten().tolist() == [224, -224, 224, 224]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_over_an_fp8_cache(dtype: torch.dtype) -> None:
    """Against float64 over what was stored: a code is off by at most 1/16, at random; softmax averages."""
    context, scales = 300, (torch.tensor([0.03]), torch.tensor([0.01]))
    cache = KVCacheLayer(*(torch.empty(20, BLOCK_SIZE, 2, 64, dtype=FP8) for _ in range(2)), *scales)
    keys, values = (_normal(context, 2, 64, seed=seed, dtype=dtype) for seed in (1, 2))
    blocks = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(context)
    store_kv(keys, values, cache, blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
    query = _normal(5, 6, 64, dtype=dtype)
    batch = AttentionBatch(
        query_starts=torch.tensor([0, 5], dtype=torch.int32),
        context_lengths=torch.tensor([context], dtype=torch.int32),
        block_tables=blocks.int().unsqueeze(0),
        slots=torch.empty(0, dtype=torch.int64),
        query_lengths=(5,),
    )
    actual = ReferenceOps(dtype).paged_attention(query, cache, batch)
    assert actual.dtype == dtype
    expected = _attend(query, keys, values).flatten(1)
    assert_close(actual, expected, max_error=0.3, rms_error=0.05)
    exact = _attend(query, *gather_context(cache, blocks, context, torch.float32)).flatten(1)
    assert_close(actual, exact, **(FLOAT32 if dtype == torch.float32 else BFLOAT16))


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
def test_decode_at_the_last_position_of_glm_4_7(dtype: torch.dtype) -> None:
    """A KV head of GLM-4.7, 202,752 tokens in shuffled blocks, against float64 over what the cache holds."""
    context, heads, dim, block_size = 202_752, 12, 128, 64
    num_blocks, generator = context // block_size, torch.Generator().manual_seed(4)
    lines = [torch.randn(num_blocks, block_size, 1, dim, generator=generator).to(dtype) for _ in range(2)]
    blocks = torch.randperm(num_blocks, generator=generator)
    batch = AttentionBatch(
        query_starts=torch.tensor([0, 2], dtype=torch.int32),
        context_lengths=torch.tensor([context], dtype=torch.int32),
        block_tables=blocks.int().unsqueeze(0),
        slots=torch.empty(0, dtype=torch.int64),
        query_lengths=(2,),
    )
    query = torch.randn(2, heads, dim, generator=generator) * 3  # sharp enough that single keys count
    actual = ReferenceOps(torch.float32).paged_attention(query, KVCacheLayer(*lines), batch)
    keys, values = (line[blocks].float().flatten(0, 2).double() for line in lines)
    scores = query.double() @ keys.T / math.sqrt(dim)  # [2, heads, context]
    scores[0, :, -1] = -torch.inf
    expected = (scores.softmax(dim=-1) @ values).flatten(1)
    assert_close(actual, expected, max_error=1e-4, rms_error=1e-5)


def test_a_shared_prefix_is_read_by_both() -> None:
    cache, batch, [first, second] = _paged([(1, 20), (1, 20)], 1, 8)
    shared = torch.stack((batch.block_tables[0], batch.block_tables[1]))
    shared[1, 0] = shared[0, 0]
    query = _normal(2, 1, 8)
    actual = ReferenceOps(torch.float32).paged_attention(query, cache, replace(batch, block_tables=shared))
    mixed = tuple(torch.cat((a[:16], b[16:])) for a, b in zip(first, second, strict=True))
    expected = torch.cat((_attend(query[:1], *first), _attend(query[1:], *mixed))).flatten(1)
    assert_close(actual, expected, **FLOAT32)


def _attention_weights(
    shape: AttentionShape, has_bias: bool, has_norms: bool, dtype: torch.dtype
) -> AttentionWeights[Tensor]:
    rows = shape.query_width + 2 * shape.kv_width
    over_heads = [RmsNorm(_normal(shape.head_dim, seed=seed, dtype=dtype), 1e-5) for seed in (4, 5)]
    norms = over_heads if has_norms else [None, None]
    return AttentionWeights(
        shape=shape,
        norm=RmsNorm(_normal(HIDDEN, seed=2, dtype=dtype), 1e-5),
        qkv=_normal(rows, HIDDEN, scale=HIDDEN**-0.5, dtype=dtype),
        qkv_bias=_normal(rows, seed=3, dtype=dtype) if has_bias else None,
        query_norm=norms[0],
        key_norm=norms[1],
        output=_normal(HIDDEN, shape.query_width, seed=6, scale=shape.query_width**-0.5, dtype=dtype),
    )


def _project(
    hidden: Tensor, weights: AttentionWeights[Tensor], angles: RotaryAngles
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in float64, head by head."""
    shape = weights.shape
    x = _rms_norm(hidden, weights.norm)
    heads = []
    for head in range(shape.num_heads + 2 * shape.num_kv_heads):
        rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
        bias = 0 if weights.qkv_bias is None else weights.qkv_bias[rows].double()
        heads.append(x @ weights.qkv[rows].double().T + bias)
    query = torch.stack(heads[: shape.num_heads], 1)
    key = torch.stack(heads[shape.num_heads : -shape.num_kv_heads], 1)
    value = torch.stack(heads[-shape.num_kv_heads :], 1)
    query = _rms_norm(query, weights.query_norm) if weights.query_norm else query
    key = _rms_norm(key, weights.key_norm) if weights.key_norm else key
    return _rotate(query, angles), _rotate(key, angles), value


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(
    "shape", [AttentionShape(4, 2, 16, 8), AttentionShape(3, 3, 8, 8), AttentionShape(5, 1, 6, 2)], ids=str
)
def test_attention_input(
    shape: AttentionShape,
    has_norms: bool,
    has_bias: bool,
    dtype: torch.dtype,
    tolerance: dict[str, float],
) -> None:
    weights = _attention_weights(shape, has_bias, has_norms, dtype)
    hidden, angles = _normal(4, HIDDEN, dtype=dtype), _angles([3, 4, 0, 77], shape.rotary_dim, dtype)
    empty = torch.full((5, 4, shape.num_kv_heads, shape.head_dim), torch.nan, dtype=dtype)
    cache, slots = KVCacheLayer(empty.clone(), empty.clone()), torch.tensor([11, 4, 19, 0])
    _, query = ReferenceOps(dtype).attention_input(hidden, None, weights, angles, cache, slots)
    expected = _project(hidden, weights, angles)
    assert query.dtype == dtype
    assert_close(query, expected[0], **tolerance)
    others = [slot for slot in range(20) if slot not in slots.tolist()]
    for stored, wanted in zip((cache.keys, cache.values), expected[1:], strict=True):
        assert_close(stored.flatten(0, 1)[slots], wanted, **tolerance)
        assert stored.flatten(0, 1)[others].isnan().all()


def test_attention_output_projects() -> None:
    weights = _attention_weights(AttentionShape(4, 2, 16, 8), False, False, torch.float32)
    attended = _normal(3, 64)
    expected = attended.double() @ weights.output.double().T
    actual = ReferenceOps(torch.float32).attention_output(attended, weights)
    assert_close(actual, expected, **FLOAT32)


def test_attention_outputs_of_the_ranks_add_up() -> None:
    """Each rank has one of three heads."""
    weights = _attention_weights(AttentionShape(3, 3, 16, 8), False, False, torch.float32)
    attended, ops = _normal(5, 48), ReferenceOps(torch.float32)
    total = torch.zeros(5, HIDDEN)
    for head in range(3):
        columns = slice(16 * head, 16 * head + 16)
        share = replace(weights, output=weights.output[:, columns])
        total += ops.attention_output(attended[:, columns], share)
    assert_close(total, ops.attention_output(attended, weights), **FLOAT32)


# Ends of the model.


def test_embed_looks_up_rows() -> None:
    table = _normal(7, 5)
    embedded = ReferenceOps(torch.float32).embed(torch.tensor([6, 0, 6]), Embedding(table))
    assert torch.equal(embedded, torch.stack((table[6], table[0], table[6])))


def test_embed_gives_zeros_for_ids_outside_the_table() -> None:
    """Also where the table has NaN: ids elsewhere look up nothing."""
    table = _normal(4, 5)
    table[0], table[3] = torch.nan, torch.nan
    ids = torch.tensor([10, 6, 8, 11, 0, 151_551])
    embedded = ReferenceOps(torch.float32).embed(ids, Embedding(table, first_id=7))
    zeros = torch.zeros(5)
    assert embedded[3:].equal(torch.stack((zeros, zeros, zeros)))
    assert embedded[1].equal(zeros)
    assert embedded[2].equal(table[1])
    assert embedded[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_of_the_ranks_add_up_exactly(dtype: torch.dtype) -> None:
    table, ops = _normal(12, 5, dtype=dtype), ReferenceOps(dtype)
    ids = torch.tensor([11, 0, 3, 4, 7, 8, 3])
    shards = [Embedding(table[first : first + 4], first) for first in (0, 4, 8)]
    total = sum((ops.embed(ids, shard) for shard in shards), torch.zeros(7, 5, dtype=dtype))
    assert total.dtype == dtype
    assert torch.equal(total, table[ids])


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_logits_are_float32(dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    hidden, head = _normal(3, HIDDEN, dtype=dtype), _normal(31, HIDDEN, scale=0.2, dtype=dtype)
    norm = RmsNorm(_normal(HIDDEN, seed=1, dtype=dtype), 1e-5)
    logits = ReferenceOps(dtype).logits(hidden, norm, head)
    assert logits.dtype == torch.float32
    assert_close(logits, _rms_norm(hidden, norm) @ head.double().T, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_weights_are_in_the_activation_dtype(dtype: torch.dtype) -> None:
    ops, weight = ReferenceOps(dtype), _normal(3, 4, 32)
    assert torch.equal(ops.prepare_weight(weight), weight.to(dtype))
    quantized = nvfp4.quantize(weight)
    assert torch.equal(ops.prepare_weight(quantized), quantized.dequantize(dtype))


# Sampling.

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.93},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 3, "top_p": 0.6, "min_p": 0.01},
]


def _batch(
    count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingBatch:
    """Equal parameters in every row, and different random bits."""
    return SamplingBatch(
        temperatures=torch.full((count,), temperature),
        top_ks=torch.full((count,), top_k),
        top_ps=torch.full((count,), top_p),
        min_ps=torch.full((count,), min_p),
        draws=torch.tensor([draw_bits(0, position) for position in range(count)]),
    )


def _sample(logits: Tensor, batch: SamplingBatch) -> list[int]:
    """Sample every row of the batch from the same logits [V]."""
    picks = ReferenceOps(torch.float32).sample(logits.expand(len(batch.draws), -1), batch, len(logits))
    assert picks.dtype == torch.int64
    return picks.tolist()


def _distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> dict[int, float]:
    """Token -> probability in float64, by the documented order: temperature, min_p, top_k, top_p."""
    weights = ((logits.double() - logits.max().double()) / temperature).exp().tolist()
    kept = [(weight, token) for token, weight in enumerate(weights) if weight >= min_p]
    kept = sorted(kept, key=lambda pair: -pair[0])[: top_k or None]
    total, mass, nucleus = sum(weight for weight, _ in kept), 0.0, []
    for weight, token in kept:
        if nucleus and top_p < 1 and mass >= top_p:
            break
        nucleus.append((weight, token))
        mass += weight / total
    total = sum(weight for weight, _ in nucleus)
    return {token: weight / total for weight, token in nucleus if weight}


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_drawn_tokens_pass_a_chi_square_test(filters: dict[str, Any]) -> None:
    logits, count = _normal(16, seed=3), 20_000
    picks = _sample(logits, _batch(count, **filters))
    expected = _distribution(logits, **filters)
    assert set(picks) <= set(expected)
    statistic = sum((picks.count(t) - p * count) ** 2 / (p * count) for t, p in expected.items())
    freedom = len(expected) - 1
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom) + 8  # far in the tail: p < 1e-4


PROBABILITIES = torch.tensor([0.1, 0.4, 0.3, 0.2])


@pytest.mark.parametrize(
    ("filters", "tokens"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.5}, {1, 2}),
        ({"min_p": 0.6}, {1, 2}),
        # top_k leaves 4/7 and 3/7, so that half of the mass is one token.
        ({"top_k": 2, "top_p": 0.5}, {1}),
        # So does min_p.
        ({"min_p": 0.6, "top_p": 0.5}, {1}),
        # Temperature makes the second token 9/16, or 0.87, or all four of the best token's probability.
        ({"min_p": 0.6, "temperature": 0.5}, {1}),
        ({"min_p": 0.6, "temperature": 2.0}, {1, 2, 3}),
        ({"top_p": 0.5, "temperature": 0.5}, {1}),
        ({"top_p": 0.8, "temperature": 2.0}, {1, 2, 3}),
    ],
    ids=str,
)
def test_filters_apply_in_the_documented_order(filters: dict[str, Any], tokens: set[int]) -> None:
    assert set(_sample(PROBABILITIES.log(), _batch(500, **filters))) == tokens


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_no_excluded_or_impossible_token_in_a_long_vocabulary(filters: dict[str, Any]) -> None:
    for seed in range(5):
        logits = _normal(1001, seed=seed, scale=4)
        logits[::3] = -torch.inf
        assert set(_sample(logits, _batch(200, **filters))) <= set(_distribution(logits, **filters))


def test_filtering_one_row_leaves_the_pick_of_another() -> None:
    """Filters are skipped when no row has any; the noise is the same either way."""
    logits, batch = _normal(50), _batch(30)
    top_ks = torch.zeros(30, dtype=torch.int64)
    top_ks[7] = 1
    plain, filtered = _sample(logits, batch), _sample(logits, replace(batch, top_ks=top_ks))
    plain[7] = int(logits.argmax())
    assert filtered == plain


def test_of_equal_logits_top_k_keeps_as_many_as_it_says() -> None:
    assert set(_sample(torch.zeros(9), _batch(300, top_k=4))) == {0, 1, 2, 3}


def test_a_peak_leaves_nothing_to_other_tokens() -> None:
    assert set(_sample(torch.tensor([0.0, 500.0, 0.0]), _batch(200))) == {1}


def test_greedy_takes_the_first_of_equals_and_ignores_the_rest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 4.0]])
    batch = _batch(2, temperature=0, top_k=3, top_p=0.1, min_p=0.9)
    assert ReferenceOps(torch.float32).sample(logits, batch, logits.shape[1]).tolist() == [1, 0]


def test_greedy_rows_beside_sampled_rows() -> None:
    logits, count = _normal(50, scale=0.1), 40
    batch = replace(_batch(count), temperatures=torch.tensor([0.0, 1.0]).repeat(count // 2))
    picks = _sample(logits, batch)
    assert set(picks[::2]) == {int(logits.argmax())}
    assert picks[1::2] == _sample(logits, _batch(count))[1::2]
    assert len(set(picks[1::2])) > 5


def test_rounding_errors_in_the_logits_change_no_pick() -> None:
    logits, batch = _normal(200, scale=2), _batch(500, temperature=0.9)
    assert _sample(logits + _normal(200, seed=1, scale=1e-6), batch) == _sample(logits, batch)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    count = 24
    logits = _normal(count, 50, scale=3)
    mixed = replace(
        _batch(count),
        temperatures=torch.tensor([0.0, 0.5, 1.0, 1.7]).repeat(count // 4),
        top_ks=torch.tensor([0, 3, 10]).repeat(count // 3),
        top_ps=torch.tensor([1.0, 0.9, 0.3, 0.0, 0.99, 0.6, 1.0, 0.5]).repeat(count // 8),
        min_ps=torch.tensor([0.0, 0.1]).repeat(count // 2),
    )
    ops = ReferenceOps(torch.float32)
    together = ops.sample(logits, mixed, logits.shape[1]).tolist()
    alone = [ops.sample(logits[n : n + 1], _row(mixed, n), logits.shape[1]).item() for n in range(count)]
    assert together == alone


def _row(batch: SamplingBatch, row: int) -> SamplingBatch:
    return SamplingBatch(**{name: column[row : row + 1] for name, column in vars(batch).items()})


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-39, 5e-38])
def test_a_tiny_temperature_picks_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[-5.0, -3.0, -4.0], [30.0, 36.0, 3.0]])
    batch = SamplingBatch(
        temperatures=torch.full((2,), temperature),
        top_ks=torch.tensor([0, 2]),
        top_ps=torch.ones(2),
        min_ps=torch.zeros(2),
        draws=torch.tensor([3, 4]),
    )
    assert ReferenceOps(torch.float32).sample(logits, batch, logits.shape[1]).tolist() == [1, 1]
