"""Benchmark cases of what stands between the matrices: router, norm, q/k/v to cache, sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels import reference_ops
from nybble.kernels.bench.attention_workloads import BLOCK_SIZE
from nybble.kernels.bench.cases import BenchCase, ModelShape
from nybble.kernels.bench.correctness import (
    EXACT,
    ROUNDED_ONCE,
    Deviation,
    Tolerance,
    checked_rows,
    deviation,
)
from nybble.kernels.bench.inputs import BenchInputs, natural
from nybble.kernels.bench.workload import Workload, as_tensor
from nybble.kernels.ops import AttentionShape, RmsNorm, RotaryAngles, RouterWeights, Routing, SamplingBatch
from nybble.kernels.triton.norm import residual_rms_norm
from nybble.kernels.triton.qkv import qkv_launch, store_qkv
from nybble.kernels.triton.router import router_launch, routing
from nybble.kernels.triton.row import row_launch
from nybble.kernels.triton.triton_ops import TritonOps

_EPS = 1e-5
_NEAR_TIE = 1e-4
# A rounding error before the cast to E4M3 is now and then one step of it, 1 / 16 of a number.
_ROUNDED_TO_E4M3 = Tolerance(max_error=0.5, rms_error=0.01)
_REQUEST = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.0}


def router_workload(case: BenchCase, model: ModelShape, inputs: BenchInputs) -> Workload:
    """The weights that each expert has for each token are compared, where the choice is not a near tie."""
    num_experts, hidden = model.num_experts, model.hidden
    weight = inputs.normal(num_experts, hidden, dtype=torch.float32, scale=hidden**-0.5)
    bias = inputs.normal(num_experts, dtype=torch.float32, scale=0.1)
    natural_router = RouterWeights(weight, bias, model.top_k, 1, 1, normalize=True, scale=2.5)
    router = TritonOps(inputs.dtype, inputs.arch).prepare_router(natural_router)
    x = inputs.normal(case.tokens, router.weight.shape[1], dtype=inputs.operand_dtype)
    launch = router_launch(case.tokens, num_experts, x.shape[1], x.dtype, inputs.arch)

    def dense(found: Routing) -> Tensor:
        table = torch.zeros(case.tokens, num_experts, device=inputs.device)
        return table.scatter_(1, found.ids.long(), found.weights)

    def judge(output: Tensor) -> Deviation:
        rows = checked_rows(case.tokens).to(inputs.device)
        tokens = natural(x[rows], hidden).float()
        scores = (tokens @ weight.T).sigmoid() + bias
        last, next_ = scores.topk(model.top_k + 1).values[:, -2:].unbind(1)
        is_clear = last - next_ > _NEAR_TIE
        found = reference_ops.route(tokens[is_clear], natural_router)
        expected = torch.zeros(len(found.ids), num_experts, device=inputs.device)
        expected.scatter_(1, found.ids, found.weights)
        return deviation(output, expected, rows[is_clear])

    return Workload(lambda: routing(x, router, launch=launch), dense, judge, ROUNDED_ONCE)


def norm_workload(case: BenchCase, model: ModelShape, inputs: BenchInputs) -> Workload:
    """The sum replaces the hidden states, so what is expected is computed beforehand."""
    hidden, update = inputs.normal(case.tokens, model.hidden), inputs.normal(case.tokens, model.hidden)
    norm = RmsNorm(inputs.normal(model.hidden), _EPS)
    rows = checked_rows(case.tokens)
    expected = None
    if not inputs.is_meta:
        rows = rows.to(inputs.device)
        total = hidden[rows].float() + update[rows].float()
        expected = reference_ops.rms_norm(total.to(inputs.dtype), norm)

    def run() -> Tensor:
        _, normed = residual_rms_norm(
            hidden,
            update,
            norm,
            fragment_order=True,
            padded_width=model.hidden,
            dtype=inputs.dtype,
            launch=row_launch(model.hidden, inputs.arch),
        )
        return normed

    def judge(output: Tensor) -> Deviation:
        assert expected is not None
        return deviation(output, expected, rows)

    return Workload(run, lambda normed: natural(normed, model.hidden), judge, ROUNDED_ONCE)


def store_qkv_workload(case: BenchCase, model: ModelShape, inputs: BenchInputs) -> Workload:
    """What is compared are queries, and the keys and values that the cache then holds, side by side."""
    shape = model.shard(case.tp).heads
    width = shape.query_width + 2 * shape.kv_width
    qkv, bias = inputs.normal(case.tokens, width), inputs.normal(width, scale=0.1)
    norms = RmsNorm(inputs.normal(shape.head_dim), _EPS), RmsNorm(inputs.normal(shape.head_dim), _EPS)
    phases = inputs.normal(case.tokens, shape.rotary_dim // 2, dtype=torch.float32)
    angles = RotaryAngles(phases.cos().to(inputs.dtype), phases.sin().to(inputs.dtype))
    cache_dtype = torch.float8_e4m3fn if case.format == "fp8" else inputs.dtype
    lead = (-(-case.tokens // BLOCK_SIZE), shape.num_kv_heads)
    keys = inputs.empty(*lead, BLOCK_SIZE, shape.head_dim, dtype=cache_dtype)
    values = inputs.empty(*lead, shape.head_dim, BLOCK_SIZE, dtype=cache_dtype)
    slots = torch.arange(case.tokens, device=inputs.device)
    one = torch.ones(1, device=inputs.device)
    launch = qkv_launch(case.tokens, shape, inputs.arch, cache_dtype=cache_dtype)

    def run() -> Tensor:
        arguments = qkv, bias, shape, *norms, angles, keys, values, slots
        return store_qkv(*arguments, key_scale=one, value_scale=one, values_transposed=True, launch=launch)

    def output(query: Tensor) -> Tensor:
        stored = keys.float().transpose(1, 2).flatten(0, 1), values.float().permute(0, 3, 1, 2).flatten(0, 1)
        parts = (query.float(), *(part[: case.tokens] for part in stored))
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def judge(found: Tensor) -> Deviation:
        expected = _expected_heads(qkv + bias, shape, norms, angles, cache_dtype)
        return deviation(found, expected)

    return Workload(run, output, judge, _ROUNDED_TO_E4M3 if case.format == "fp8" else ROUNDED_ONCE)


def _expected_heads(
    qkv: Tensor,
    shape: AttentionShape,
    norms: tuple[RmsNorm, RmsNorm],
    angles: RotaryAngles,
    cache_dtype: torch.dtype,
) -> Tensor:
    """float32 [T, all heads * D]"""
    query, key, value = reference_ops.split_heads(qkv, shape)
    query = reference_ops.rotate(reference_ops.rms_norm(query, norms[0]), angles)
    key = reference_ops.rotate(reference_ops.rms_norm(key, norms[1]), angles)
    parts = query.float(), key.to(cache_dtype).float(), value.to(cache_dtype).float()
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def sampling_workload(case: BenchCase, model: ModelShape, inputs: BenchInputs) -> Workload:
    """Every row is drawn with top-k and top-p, which is the most work."""
    logits = inputs.normal(case.tokens, model.vocabulary, dtype=torch.float32, scale=3.0)

    def rows(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((case.tokens,), value, dtype=dtype, device=inputs.device)

    batch = SamplingBatch(
        temperatures=rows(_REQUEST["temperature"]),
        top_ks=rows(_REQUEST["top_k"], torch.int64),
        top_ps=rows(_REQUEST["top_p"]),
        min_ps=rows(_REQUEST["min_p"]),
        draws=inputs.integers(0, 1 << 62, case.tokens, dtype=torch.int64),
    )
    ops = TritonOps(inputs.dtype, inputs.arch)

    def judge(picks: Tensor) -> Deviation:
        return deviation(picks, reference_ops.draw(logits, batch))

    return Workload(lambda: ops.sample(logits, batch, model.vocabulary), as_tensor, judge, EXACT)
