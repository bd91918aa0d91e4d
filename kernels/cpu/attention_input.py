"""Norm, q/k/v projection, per-head norms, rotation, and writing keys and values to the cache: one call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nybble.kernels.cpu.cpu_matrix import CpuMatrix
from nybble.kernels.cpu.index_range import index_range
from nybble.kernels.cpu.kv_cache_layout import NativeKVCache, native_kv_cache, num_slots
from nybble.kernels.cpu.native_forms import NativeForms
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.tensor_pointer import pointer
from nybble.kernels.ops import AttentionShape, AttentionWeights, KVCacheLayer, RmsNorm, RotaryAngles


class _Weights(ctypes.Structure):
    """struct nybble_attention_weights."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("hidden_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("rotary_dim", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("query_eps", ctypes.c_float),
        ("key_eps", ctypes.c_float),
    )


class _Arguments(ctypes.Structure):
    """struct nybble_attention_input."""

    _fields_ = (
        ("weights", ctypes.POINTER(_Weights)),
        ("cache", ctypes.POINTER(NativeKVCache)),
        ("hidden", ctypes.c_void_p),
        ("update", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
    )


def attention_input(
    pool: Pool,
    hidden: Tensor,
    update: Tensor | None,
    weights: AttentionWeights[CpuMatrix],
    angles: RotaryAngles,
    cache: KVCacheLayer,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `Ops.attention_input`. hidden, float32 [T, H], is changed to hidden + update and returned.

    Raises:
        ValueError: an argument has another shape or dtype than it should, or a slot is not in the cache.
    """
    native, native_cache = _native(weights), native_kv_cache(cache)
    shape = weights.shape
    if (native_cache.num_kv_heads, native_cache.head_dim) != (shape.num_kv_heads, shape.head_dim):
        raise ValueError(
            f"the cache has {native_cache.num_kv_heads} heads of {native_cache.head_dim}, "
            f"expected {shape.num_kv_heads} of {shape.head_dim}"
        )
    num_tokens = hidden.shape[0]
    slots_pointer = pointer("slots", slots, torch.int64, (num_tokens,))
    _check_range(_slot_range(slots), num_slots(cache))
    _check_before_replay(pool, slots, num_slots(cache))
    query = pool.empty(num_tokens, shape.num_heads, shape.head_dim)
    hidden_shape, angles_shape = (num_tokens, native.hidden_size), (num_tokens, shape.rotary_dim // 2)
    hidden_pointer = pointer("hidden", hidden, torch.float32, hidden_shape)
    arguments = _Arguments(
        ctypes.pointer(native),
        ctypes.pointer(native_cache),
        hidden_pointer,
        None if update is None else pointer("update", update, torch.float32, hidden_shape),
        hidden_pointer,
        query.data_ptr(),
        pointer("angles.cos", angles.cos, torch.float32, angles_shape),
        pointer("angles.sin", angles.sin, torch.float32, angles_shape),
        slots_pointer,
        num_tokens,
    )
    pool.run(pool.operation("nybble_attention_input", _Arguments), arguments)
    return hidden, query


def _native_weights(weights: AttentionWeights[CpuMatrix]) -> _Weights:
    shape = weights.shape
    rows, hidden_size = weights.qkv.shape
    _check_shape(shape, rows)
    return _Weights(
        weights.qkv.address,
        pointer("norm.weight", weights.norm.weight, torch.float32, (hidden_size,)),
        None if weights.qkv_bias is None else pointer("qkv_bias", weights.qkv_bias, torch.float32, (rows,)),
        _head_norm("query_norm.weight", weights.query_norm, shape),
        _head_norm("key_norm.weight", weights.key_norm, shape),
        hidden_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.rotary_dim,
        weights.norm.eps,
        weights.query_norm.eps if weights.query_norm else 0.0,
        weights.key_norm.eps if weights.key_norm else 0.0,
    )


def _check_shape(shape: AttentionShape, rows: int) -> None:
    expected = shape.query_width + 2 * shape.kv_width
    if rows != expected:
        raise ValueError(f"qkv has {rows} rows, expected {expected}: {shape}")
    if shape.rotary_dim % 2 or not 0 <= shape.rotary_dim <= shape.head_dim:
        raise ValueError(f"rotary_dim is {shape.rotary_dim}, expected an even number up to {shape.head_dim}")


def _head_norm(name: str, norm: RmsNorm | None, shape: AttentionShape) -> int | None:
    return None if norm is None else pointer(name, norm.weight, torch.float32, (shape.head_dim,))


def _check_range(slots: tuple[int, int], end: int) -> None:
    lowest, highest = slots
    if lowest < 0 or highest >= end:
        raise ValueError(f"slots are {lowest} to {highest}, but the cache has {end}")


def _check_before_replay(pool: Pool, slots: Tensor, end: int) -> None:
    pool.before_replay(("slots", id(slots), end), lambda: _check_range(index_range(slots), end))


_native = NativeForms(_native_weights)
_slot_range = NativeForms(index_range)  # once for all layers of a step
