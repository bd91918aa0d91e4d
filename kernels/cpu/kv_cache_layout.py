"""The layout of the KV cache on this backend, and its description for C.

    keys    [blocks, num_kv_heads, D, block_size]
    values  [blocks, num_kv_heads, block_size, D]

Neighbouring keys of one dimension lie side by side, so that the scores of as many keys as a vector has lanes
are summed up without a sum across lanes.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from nybble.kernels.cpu.native_forms import NativeForms
from nybble.kernels.cpu.tensor_pointer import pointer
from nybble.kernels.ops import KVCacheLayer

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}  # enum nybble_kv_dtype


class NativeKVCache(ctypes.Structure):
    """struct nybble_kv_cache."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scale", ctypes.c_float),
        ("value_scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
    )


def new_kv_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> KVCacheLayer:
    """A layer's cache, uninitialised.

    Raises:
        ValueError: there is no such cache: dtype is another than float32, bfloat16 and float8_e4m3fn.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"a KV cache of {dtype}: expected one of {', '.join(map(str, _DTYPES))}")
    keys = torch.empty((num_blocks, num_kv_heads, head_dim, block_size), dtype=dtype)
    values = torch.empty((num_blocks, num_kv_heads, block_size, head_dim), dtype=dtype)
    return KVCacheLayer(keys=keys, values=values)


def num_slots(cache: KVCacheLayer) -> int:
    return cache.values.shape[0] * cache.values.shape[2]


def from_slot_order(cache: KVCacheLayer) -> KVCacheLayer:
    """A copy of a cache in the order of `ReferenceOps`, [blocks, block_size, num_kv_heads, D]."""
    keys, values = cache.keys.permute(0, 2, 3, 1).contiguous(), cache.values.permute(0, 2, 1, 3).contiguous()
    return replace(cache, keys=keys, values=values)


def to_slot_order(cache: KVCacheLayer) -> KVCacheLayer:
    """The inverse of `from_slot_order`."""
    keys, values = cache.keys.permute(0, 3, 1, 2).contiguous(), cache.values.permute(0, 2, 1, 3).contiguous()
    return replace(cache, keys=keys, values=values)


def _native(cache: KVCacheLayer) -> NativeKVCache:
    num_blocks, num_kv_heads, block_size, head_dim = cache.values.shape
    dtype = cache.values.dtype
    return NativeKVCache(
        pointer("cache.keys", cache.keys, dtype, (num_blocks, num_kv_heads, head_dim, block_size)),
        pointer("cache.values", cache.values, dtype, (num_blocks, num_kv_heads, block_size, head_dim)),
        _scale(cache.key_scale),
        _scale(cache.value_scale),
        _DTYPES[dtype],
        block_size,
        num_kv_heads,
        head_dim,
    )


def _scale(scale: Tensor | None) -> float:
    return 1.0 if scale is None else scale.item()


native_kv_cache = NativeForms(_native)
