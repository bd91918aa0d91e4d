"""Benchmark cases of paged attention: decode of several sequences, and one chunk of a prefill."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nybble.kernels.bench.attention_peers import AttentionProblem, attention_peers
from nybble.kernels.bench.cases import BenchCase, ModelShape
from nybble.kernels.bench.correctness import ROUNDED_TWICE, Deviation, checked_rows, deviation
from nybble.kernels.bench.inputs import BenchInputs, natural
from nybble.kernels.bench.workload import Workload
from nybble.kernels.ops import AttentionBatch, AttentionShape, KVCacheLayer
from nybble.kernels.triton.triton_ops import TritonOps

BLOCK_SIZE = 64
_CHECKED_SEQUENCES = 3
_CHECKED_TOKENS = 16
_SCORES = 2.0  # standard deviation: so that a softmax over many keys is not flat
# Codes of E4M3 from 2^-2 on and below 4.
_E4M3_LOW, _E4M3_HIGH = 0x28, 0x48


def attention_workload(case: BenchCase, model: ModelShape, inputs: BenchInputs) -> Workload:
    """Attention's own output is in fragment order, that of the peers is not: `output` puts it in order."""
    assert case.context is not None
    is_prefill = case.op == "prefill_attention"
    num_sequences, query_len = (1, case.tokens) if is_prefill else (case.tokens, 1)
    shape = model.shard(case.tp).heads
    batch = _batch(num_sequences, query_len, case.context, inputs)
    cache = _cache(batch, shape, case.format, inputs)
    query = inputs.normal(num_sequences * query_len, shape.num_heads, shape.head_dim, scale=_SCORES)
    ops = TritonOps(inputs.dtype, inputs.arch)
    problem = AttentionProblem(query, cache, batch, case.context)

    def judge(output: Tensor) -> Deviation:
        rows = checked_rows(len(query), _CHECKED_TOKENS if is_prefill else _CHECKED_SEQUENCES)
        expected = torch.stack([_expected(problem, row, query_len) for row in rows.tolist()])
        return deviation(output, expected, rows.to(inputs.device))

    return Workload(
        run=lambda: ops.paged_attention(query, cache, batch),
        output=lambda output: natural(output, shape.query_width),
        judge=judge,
        tolerance=ROUNDED_TWICE,
        peers=() if is_prefill else attention_peers(problem),
    )


def cache_bytes(case: BenchCase, model: ModelShape) -> int:
    """Of a decode or prefill case."""
    num_sequences = 1 if case.op == "prefill_attention" else case.tokens
    item_bytes = 1 if case.format == "fp8" else 2
    return 2 * num_sequences * (case.context or 0) * model.shard(case.tp).heads.kv_width * item_bytes


def _batch(num_sequences: int, query_len: int, context: int, inputs: BenchInputs) -> AttentionBatch:
    """Sequences of equal length, their blocks scattered over the cache."""
    num_blocks = math.ceil(context / BLOCK_SIZE)
    tables = inputs.shuffled(num_sequences * num_blocks).view(num_sequences, num_blocks)
    starts = torch.arange(num_sequences + 1, dtype=torch.int32, device=inputs.device) * query_len
    lengths = torch.full((num_sequences,), context, dtype=torch.int32, device=inputs.device)
    slots = inputs.empty(0, dtype=torch.int64)  # nothing is stored
    return AttentionBatch(starts, lengths, tables, slots, (query_len,) * num_sequences)


def _cache(batch: AttentionBatch, shape: AttentionShape, format: str, inputs: BenchInputs) -> KVCacheLayer:
    lead = (batch.block_tables.numel(), shape.num_kv_heads)
    sides = (BLOCK_SIZE, shape.head_dim)
    one = torch.ones(1, device=inputs.device)
    return KVCacheLayer(
        keys=_stored(format, (*lead, *sides), inputs),
        values=_stored(format, (*lead, *reversed(sides)), inputs),
        key_scale=one,
        value_scale=one,
    )


def _stored(format: str, shape: tuple[int, ...], inputs: BenchInputs) -> Tensor:
    if format == "bf16":
        return inputs.normal(*shape)
    codes = inputs.integers(_E4M3_LOW, _E4M3_HIGH, *shape, dtype=torch.uint8)
    if not inputs.is_meta:
        codes |= inputs.integers(0, 2, *shape, dtype=torch.uint8) << 7
    return codes.view(torch.float8_e4m3fn)


def _expected(problem: AttentionProblem, row: int, query_len: int) -> Tensor:
    """float32 [num_heads * D]: what token `row` of the batch gets, in float32, one KV head after the
    other."""
    sequence, position = divmod(row, query_len)
    num_seen = problem.context - query_len + position + 1
    blocks = problem.batch.block_tables[sequence].long()[: math.ceil(num_seen / BLOCK_SIZE)]
    num_kv_heads, head_dim = problem.cache.keys.shape[1], problem.query.shape[2]
    queries = problem.query[row].float().view(num_kv_heads, -1, head_dim)
    heads = []
    for head in range(num_kv_heads):
        keys = problem.cache.keys[blocks, head].float().flatten(0, 1)[:num_seen]
        values = problem.cache.values[blocks, head].float().transpose(1, 2).flatten(0, 1)[:num_seen]
        weights = torch.softmax(queries[head] @ keys.T * head_dim**-0.5, dim=-1)
        heads.append(weights @ values)
    return torch.cat(heads).flatten()
