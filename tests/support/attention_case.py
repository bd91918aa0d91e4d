"""Random contexts in a paged cache, and what attention over them gives in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton_device import DEVICE

from nybble.kernels.ops import AttentionShape, KVCacheLayer
from nybble.kernels.triton.kv_cache_layout import to_head_major

BFLOAT16 = {"max_error": 0.04, "rms_error": 3e-3}
FLOAT32 = {"max_error": 2e-5, "rms_error": 1e-6}
FP8 = torch.float8_e4m3fn
# Activations, cache, tolerance.
CACHES = [
    (torch.float32, torch.float32, FLOAT32),
    (torch.bfloat16, torch.bfloat16, BFLOAT16),
    (torch.float16, torch.float16, BFLOAT16),
    (torch.bfloat16, FP8, BFLOAT16),
    (torch.float32, FP8, {"max_error": 3e-3, "rms_error": 3e-4}),
]
# What a slot outside every context holds: values there must be finite, keys need not.
_UNUSED_VALUE = 400.0


@dataclass(frozen=True)
class AttentionCase:
    """Arguments of the launchers, head-major; contexts: of each sequence keys and values [n, heads, D]."""

    shape: AttentionShape
    query: Tensor
    cache: KVCacheLayer
    block_tables: Tensor
    context_lengths: Tensor
    query_starts: Tensor
    key_scale: Tensor
    value_scale: Tensor
    contexts: list[tuple[Tensor, Tensor]]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The positional arguments."""
        cache, tables = self.cache, self.block_tables
        return self.query, cache.keys, cache.values, tables, self.context_lengths, self.query_starts

    @property
    def options(self) -> dict[str, Any]:
        scale = 1 / math.sqrt(self.shape.head_dim)
        return {"scale": scale, "key_scale": self.key_scale, "value_scale": self.value_scale}

    @property
    def block_size(self) -> int:
        return self.cache.keys.shape[2]

    @property
    def max_context(self) -> int:
        return self.block_tables.shape[1] * self.block_size

    def empty_output(self) -> Tensor:
        """Of NaN."""
        return torch.full((len(self.query), self.shape.query_width), torch.nan).to(self.query)

    def expected(self) -> Tensor:
        """float64 [T, num_heads * D]."""
        rows = [self._attend(sequence) for sequence in range(len(self.contexts))]
        return torch.cat(rows).flatten(1)

    def _attend(self, sequence: int) -> Tensor:
        """[t, num_heads, D]: token i of t sees the first n - t + i + 1 of n keys, or nothing if n is 0."""
        first, last = self.query_starts[sequence : sequence + 2].tolist()
        query = self.query[first:last].double().cpu()
        keys, values = self.contexts[sequence]
        if not len(keys):
            return torch.zeros_like(query)
        group = self.shape.num_heads // self.shape.num_kv_heads
        keys = (keys.double() * self.key_scale.item()).repeat_interleave(group, 1)
        values = (values.double() * self.value_scale.item()).repeat_interleave(group, 1)
        scores = torch.einsum("thd,nhd->htn", query, keys) / math.sqrt(self.shape.head_dim)
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(keys) - len(query))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("htn,nhd->thd", weights, values)


def attention_case(
    spans: list[tuple[int, int]],
    *,
    heads: int = 12,
    kv_heads: int = 1,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    sharpness: float = 2.0,
) -> AttentionCase:
    """spans: of each sequence its query tokens and its context, which lies in shuffled blocks."""
    generator = torch.Generator().manual_seed(7)
    cache_dtype = cache_dtype or dtype
    counts = [-(-context // block_size) for _, context in spans]
    free = (torch.randperm(sum(counts), generator=generator) + 1).tolist()  # block 0 pads tables
    size = (sum(counts) + 1, block_size, kv_heads, head_dim)
    cache = KVCacheLayer(torch.full(size, torch.nan), torch.full(size, _UNUSED_VALUE))
    tables = torch.zeros(len(spans), max(*counts, 1), dtype=torch.int32)
    contexts = []
    for row, ((_, context), count) in enumerate(zip(spans, counts, strict=True)):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        lines = torch.randn(2, context, kv_heads, head_dim, generator=generator).to(cache_dtype).float()
        places = tables[row, :count].long()
        for stored, line in zip((cache.keys, cache.values), lines, strict=True):
            blocks = stored[places].flatten(0, 1)
            blocks[:context] = line
            stored[places] = blocks.unflatten(0, (count, block_size))
        contexts.append((lines[0], lines[1]))
    starts = torch.tensor([0, *(tokens for tokens, _ in spans)]).cumsum(0)
    query = torch.randn(int(starts[-1]), heads, head_dim, generator=generator) * sharpness
    has_scales = cache_dtype == FP8
    stored = to_head_major(KVCacheLayer(cache.keys.to(cache_dtype), cache.values.to(cache_dtype)))
    return AttentionCase(
        shape=AttentionShape(heads, kv_heads, head_dim, head_dim),
        query=query.to(DEVICE, dtype),
        cache=KVCacheLayer(stored.keys.to(DEVICE), stored.values.to(DEVICE)),
        block_tables=tables.to(DEVICE),
        context_lengths=torch.tensor([context for _, context in spans], dtype=torch.int32).to(DEVICE),
        query_starts=starts.to(DEVICE, torch.int32),
        key_scale=torch.full((1,), 0.75 if has_scales else 1.0, device=DEVICE),
        value_scale=torch.full((1,), 3.0 if has_scales else 1.0, device=DEVICE),
        contexts=contexts,
    )
