"""Causal attention over the blocks of each sequence."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import torch
from torch import Tensor

from nybble.kernels.cpu.index_range import index_range
from nybble.kernels.cpu.kv_cache_layout import NativeKVCache, native_kv_cache
from nybble.kernels.cpu.native_forms import NativeForms
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.tensor_pointer import pointer
from nybble.kernels.ops import AttentionBatch, KVCacheLayer


class _Arguments(ctypes.Structure):
    """struct nybble_paged_attention."""

    _fields_ = (
        ("cache", ctypes.POINTER(NativeKVCache)),
        ("query", ctypes.c_void_p),
        ("attended", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("context_lengths", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("max_blocks", ctypes.c_int64),
        ("num_sequences", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
    )


def paged_attention(pool: Pool, query: Tensor, cache: KVCacheLayer, batch: AttentionBatch) -> Tensor:
    """See `Ops.paged_attention`. Keys and values are read once for all query heads that they serve.

    Of a token the result has the same bits whatever else is in the step.

    Raises:
        ValueError: an argument has another shape or dtype than it should, or the batch is none of this cache.
    """
    checked = _checked(batch)
    num_tokens, num_heads, head_dim = query.shape
    native_cache = native_kv_cache(cache)
    checked.check(cache, num_tokens)
    _check_before_replay(pool, batch, cache, num_tokens)
    if head_dim != native_cache.head_dim or num_heads % native_cache.num_kv_heads:
        raise ValueError(
            f"query has {num_heads} heads of {head_dim}, "
            f"but the cache {native_cache.num_kv_heads} of {native_cache.head_dim}"
        )
    attended = pool.empty(num_tokens, num_heads * head_dim)
    arguments = _Arguments(
        ctypes.pointer(native_cache),
        pointer("query", query, torch.float32, (num_tokens, num_heads, head_dim)),
        attended.data_ptr(),
        *checked.pointers,
        checked.max_blocks,
        checked.num_sequences,
        num_heads,
    )
    pool.run(pool.operation("nybble_paged_attention", _Arguments), arguments)
    return attended


class _CheckedBatch:
    """The bounds of a batch, found once for all layers of a step."""

    def __init__(self, batch: AttentionBatch) -> None:
        self.num_sequences, self.max_blocks = batch.block_tables.shape
        self.pointers = (
            pointer("query_starts", batch.query_starts, torch.int32, (self.num_sequences + 1,)),
            pointer("context_lengths", batch.context_lengths, torch.int32, (self.num_sequences,)),
            pointer("block_tables", batch.block_tables, torch.int32, (self.num_sequences, self.max_blocks)),
        )
        starts, lengths = batch.query_starts.tolist(), batch.context_lengths.tolist()
        query_lengths = [end - start for start, end in pairwise(starts)]
        if starts[0] or min(query_lengths, default=1) < 1:
            raise ValueError(f"query_starts are {starts}, expected them to rise from 0")
        for sequence, (queries, length) in enumerate(zip(query_lengths, lengths, strict=True)):
            if queries > length:
                raise ValueError(
                    f"sequence {sequence} has {queries} queries, but a context of {length} tokens"
                )
        self.num_tokens = starts[-1]
        self._longest = max(lengths, default=0)
        self._lowest_block, self._highest_block = index_range(batch.block_tables)

    def check(self, cache: KVCacheLayer, num_tokens: int) -> None:
        num_blocks, block_size = cache.values.shape[0], cache.values.shape[2]
        if self.num_tokens != num_tokens:
            raise ValueError(f"query has {num_tokens} tokens, but the batch {self.num_tokens}")
        if self._longest > self.max_blocks * block_size:
            raise ValueError(
                f"a context has {self._longest} tokens, "
                f"but block tables have {self.max_blocks} blocks of {block_size}"
            )
        if self._lowest_block < 0 or self._highest_block >= num_blocks:
            raise ValueError(
                f"block_tables have blocks {self._lowest_block} to {self._highest_block}, "
                f"but the cache {num_blocks} blocks"
            )


def _check_before_replay(pool: Pool, batch: AttentionBatch, cache: KVCacheLayer, num_tokens: int) -> None:
    key = ("batch", id(batch), cache.values.shape)
    pool.before_replay(key, lambda: _CheckedBatch(batch).check(cache, num_tokens))


_checked = NativeForms(_CheckedBatch)
