"""Decode attention by other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.bench.peers import library, require, require_room
from nybble.kernels.bench.workload import Peer
from nybble.kernels.ops import AttentionBatch, KVCacheLayer

_WORKSPACE_BYTES = 128 << 20


@dataclass(frozen=True)
class AttentionProblem:
    """query [T, num_heads, D]; cache: as `kv_cache_layout` has it, with scales of 1; context: of each
    sequence."""

    query: Tensor
    cache: KVCacheLayer
    batch: AttentionBatch
    context: int


def attention_peers(problem: AttentionProblem) -> tuple[Peer, ...]:
    return (
        Peer("torch sdpa", lambda: _sdpa(problem)),
        Peer("flashinfer", lambda: _flashinfer(problem)),
    )


def _sdpa(problem: AttentionProblem) -> Callable[[], Tensor]:
    """Of keys and values that lie in order, in the dtype of the queries: torch's knows no pages."""
    query, tables = problem.query, problem.batch.block_tables.long()
    num_sequences, num_heads, head_dim = query.shape
    require(problem.cache.keys.dtype == query.dtype, "torch's attention takes no FP8 cache")
    _require_room(problem)
    # [S, blocks, heads, block, D] -> [S, heads, tokens, D]
    keys = problem.cache.keys[tables].transpose(1, 2).flatten(2, 3)[:, :, : problem.context]
    values = (
        problem.cache.values[tables].transpose(3, 4).transpose(1, 2).flatten(2, 3)[:, :, : problem.context]
    )
    rows = query.view(num_sequences, num_heads, 1, head_dim)

    def run() -> Tensor:
        return F.scaled_dot_product_attention(rows, keys, values, enable_gqa=True).flatten(1)

    return run


def _flashinfer(problem: AttentionProblem) -> Callable[[], Tensor]:
    """Its batch decode with pages in the order [page, head, slot, D]; planning is not timed."""
    flashinfer = library("flashinfer")
    _require_room(problem)
    query, keys = problem.query, problem.cache.keys
    values = problem.cache.values.transpose(2, 3).contiguous()
    _, num_kv_heads, page_size, head_dim = keys.shape
    num_sequences = len(query)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    per_sequence = math.ceil(problem.context / page_size)
    wrapper.plan(
        torch.arange(num_sequences + 1, dtype=torch.int32, device=query.device) * per_sequence,
        problem.batch.block_tables.flatten(),
        torch.full_like(problem.batch.context_lengths, problem.context - (per_sequence - 1) * page_size),
        query.shape[1],
        num_kv_heads,
        head_dim,
        page_size,
        pos_encoding_mode="NONE",
        q_data_type=query.dtype,
        kv_data_type=keys.dtype,
    )

    def run() -> Tensor:
        attended: Tensor = wrapper.run(query, (keys, values))
        return attended.flatten(1)

    return run


def _require_room(problem: AttentionProblem) -> None:
    needed = problem.cache.keys.nbytes + problem.cache.values.nbytes
    require_room(needed, "a second copy of the cache", problem.query.device)
