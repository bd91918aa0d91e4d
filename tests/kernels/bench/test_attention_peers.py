"""Peers of decode attention: torch's own, and FlashInfer's by a stand-in with its interface."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.bench.attention_peers import AttentionProblem, attention_peers
from nybble.kernels.bench.workload import PeerMissingError
from nybble.kernels.ops import AttentionBatch, KVCacheLayer

HEADS, KV_HEADS, DIM, PAGE, CONTEXT = 4, 2, 16, 8, 21


def make_problem(dtype: torch.dtype = torch.float32) -> AttentionProblem:
    """Two sequences of three pages each, in any order."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(6, KV_HEADS, PAGE, DIM, generator=generator).to(dtype)
    values = torch.randn(6, KV_HEADS, DIM, PAGE, generator=generator).to(dtype)
    tables = torch.tensor([[4, 0, 5], [2, 1, 3]], dtype=torch.int32)
    batch = AttentionBatch(
        query_starts=torch.tensor([0, 1, 2], dtype=torch.int32),
        context_lengths=torch.tensor([CONTEXT, CONTEXT], dtype=torch.int32),
        block_tables=tables,
        slots=torch.empty(0, dtype=torch.int64),
        query_lengths=(1, 1),
    )
    query = torch.randn(2, HEADS, DIM, generator=generator)
    return AttentionProblem(query, KVCacheLayer(keys, values), batch, CONTEXT)


def expected(problem: AttentionProblem) -> Tensor:
    rows = []
    for query, table in zip(problem.query, problem.batch.block_tables.long(), strict=True):
        keys = problem.cache.keys[table].float().transpose(0, 1).flatten(1, 2)[:, :CONTEXT]
        values = problem.cache.values[table].float().permute(1, 0, 3, 2).flatten(1, 2)[:, :CONTEXT]
        attended = F.scaled_dot_product_attention(query.unsqueeze(1), keys, values, enable_gqa=True)
        rows.append(attended.flatten())
    return torch.stack(rows)


class BatchDecode:
    """Attention over pages [page, head, slot, D], as FlashInfer's wrapper is planned and run."""

    def __init__(self, workspace: Tensor, kv_layout: str, use_tensor_cores: bool) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "HND" and use_tensor_cores

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, *shape: int, **options: Any
    ) -> None:
        assert shape == (HEADS, KV_HEADS, DIM, PAGE) and options["pos_encoding_mode"] == "NONE"
        self._pages = [indices[first:last] for first, last in pairwise(indptr)]
        self._lengths = [
            (len(pages) - 1) * PAGE + int(last)
            for pages, last in zip(self._pages, last_page_len, strict=True)
        ]

    def run(self, query: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        rows = []
        for row, pages, length in zip(query, self._pages, self._lengths, strict=True):
            keys, values = (
                part[pages.long()].float().transpose(0, 1).flatten(1, 2)[:, :length] for part in cache
            )
            rows.append(F.scaled_dot_product_attention(row.unsqueeze(1), keys, values, enable_gqa=True))
        return torch.stack(rows).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_flashinfer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    problem = make_problem(dtype)
    _, peer = attention_peers(problem)
    torch.testing.assert_close(peer.prepare()(), expected(problem))


def test_sdpa() -> None:
    problem = make_problem()
    peer, _ = attention_peers(problem)
    torch.testing.assert_close(peer.prepare()(), expected(problem))


def test_sdpa_has_no_fp8() -> None:
    peer, _ = attention_peers(make_problem(torch.float8_e4m3fn))
    with pytest.raises(PeerMissingError, match="takes no FP8 cache"):
        peer.prepare()
