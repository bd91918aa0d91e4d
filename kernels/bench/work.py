"""What a benchmark case must at least read, write and multiply, whatever the kernels do.

Inputs and outputs count once, weights of those experts that have tokens; what is kept between two kernels of
a case does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.kernels.bench.cases import LINEAR_OPS, BenchCase, ModelShape
from nybble.kernels.bench.routing import expert_counts, expert_ids

_WEIGHT_BYTES = {"nvfp4": 1 / 2 + 1 / 16, "mxfp4": 1 / 2 + 1 / 32, "fp8": 1, "bf16": 2, "fp32": 4}
_ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Work:
    """flops: of matrix products only, an addition and a multiplication counted as two."""

    num_bytes: int
    flops: int


def case_work(case: BenchCase, model: ModelShape) -> Work:
    """Of one rank; `model` is the whole."""
    shard = model.shard(case.tp)
    if case.op in LINEAR_OPS:
        return _linear(case, shard)
    return {
        "experts": _experts,
        "router": _router,
        "attention": _attention,
        "prefill_attention": _prefill_attention,
        "norm": _norm,
        "store_qkv": _store_qkv,
        "sampling": _sampling,
    }[case.op](case, shard)


def seen_pairs(case: BenchCase) -> int:
    """Of a chunk at the end of its context: its tokens times the keys that each sees."""
    before = (case.context or case.tokens) - case.tokens
    return case.tokens * before + case.tokens * (case.tokens + 1) // 2


def _linear(case: BenchCase, shard: ModelShape) -> Work:
    rows, width = shard.matrix(case.op)
    output_bytes = 4 if case.op == "head" else _ACTIVATION_BYTES
    weight = rows * width * _WEIGHT_BYTES[case.format]
    num_bytes = weight + case.tokens * (width * _ACTIVATION_BYTES + rows * output_bytes)
    return Work(round(num_bytes), 2 * case.tokens * rows * width)


def _experts(case: BenchCase, shard: ModelShape) -> Work:
    """The shared expert is read by all tokens."""
    ids = expert_ids(case.tokens, shard.num_experts, shard.top_k, case.routing or "uniform")
    num_used = 1 + sum(count > 0 for count in expert_counts(ids, shard.num_experts))
    weights = 3 * shard.expert_width * shard.hidden
    choices = case.tokens * shard.top_k * 8  # an id and a weight
    activations = 2 * case.tokens * shard.hidden * _ACTIVATION_BYTES
    num_bytes = num_used * weights * _WEIGHT_BYTES[case.format] + choices + activations
    return Work(round(num_bytes), 2 * weights * (ids.numel() + case.tokens))


def _router(case: BenchCase, shard: ModelShape) -> Work:
    weights = shard.num_experts * shard.hidden
    activations = case.tokens * (shard.hidden * _ACTIVATION_BYTES + shard.top_k * 8)
    return Work(int(weights * _WEIGHT_BYTES[case.format]) + activations, 2 * case.tokens * weights)


def _attention(case: BenchCase, shard: ModelShape) -> Work:
    keys = case.tokens * (case.context or 0)
    return _attended(case, shard, num_keys=keys, num_pairs=keys)


def _prefill_attention(case: BenchCase, shard: ModelShape) -> Work:
    return _attended(case, shard, num_keys=case.context or case.tokens, num_pairs=seen_pairs(case))


def _attended(case: BenchCase, shard: ModelShape, num_keys: int, num_pairs: int) -> Work:
    """num_pairs: query tokens times the keys that each sees."""
    cache = 2 * num_keys * shard.heads.kv_width * _WEIGHT_BYTES[case.format]
    queries = 2 * case.tokens * shard.heads.query_width * _ACTIVATION_BYTES
    return Work(round(cache + queries), 4 * num_pairs * shard.heads.query_width)


def _norm(case: BenchCase, shard: ModelShape) -> Work:
    """Hidden states and update are read; their sum and its norm are written."""
    return Work((4 * case.tokens + 1) * shard.hidden * _ACTIVATION_BYTES, 0)


def _store_qkv(case: BenchCase, shard: ModelShape) -> Work:
    heads = shard.heads
    activations = 2 * heads.query_width + 2 * heads.kv_width + heads.rotary_dim
    stored = 2 * heads.kv_width * _WEIGHT_BYTES[case.format]
    return Work(round(case.tokens * (activations * _ACTIVATION_BYTES + stored)), 0)


def _sampling(case: BenchCase, shard: ModelShape) -> Work:
    return Work(int(case.tokens * shard.vocabulary * _WEIGHT_BYTES[case.format]), 0)
