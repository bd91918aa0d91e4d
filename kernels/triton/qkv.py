"""What lies between the q/k/v projection and attention, in one launch: bias, norms of heads, rotation, cache.

All heads of one kind (queries, then keys, then values) are rows, of which a program takes a few. A row is
held in two tensors of D / 2 columns each: column i is paired with column i + r / 2, with which it is rotated
(r = rotary_dim); what is not rotated is divided in half.

    column      0 .. r/2    r/2 .. r    r .. (r + D)/2    (r + D)/2 .. D        r = rotary_dim
    tensor      first       second      first             second
    at          0 .. r/2    0 .. r/2    r/2 .. D/2        r/2 .. D/2

Each step rounds to the activation dtype where the reference does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.ops import AttentionShape, RmsNorm, RotaryAngles
from nybble.kernels.triton.activation_quantization import e4m3_bits
from nybble.kernels.triton.launch import launch as launch_kernel

_FEW_ROWS = 8192
_PER_WARP = 256  # pairs: 16 bytes of bfloat16 in each of the two tensors for each thread


@dataclass(frozen=True)
class QkvLaunch:
    """A program takes `rows`, a power of two, of one kind of heads."""

    rows: int
    num_warps: int


def qkv_launch(
    tokens: int, shape: AttentionShape, arch: int, *, cache_dtype: torch.dtype = torch.bfloat16
) -> QkvLaunch:
    """One warp a program while there are few rows, to spread them; later enough tokens in each program to
    store transposed values in runs. Raises ValueError for an FP8 cache below sm_90: no conversion to E4M3."""
    if cache_dtype == torch.float8_e4m3fn and arch < 90:
        raise ValueError(f"sm_{arch} cannot store an FP8 cache: it has no conversion to E4M3")
    warp_rows = max(_PER_WARP // _num_pairs(shape.head_dim), 1)
    heads = shape.num_heads + 2 * shape.num_kv_heads
    if tokens * heads < _FEW_ROWS:
        return QkvLaunch(warp_rows, num_warps=1)
    return QkvLaunch(rows=max(32, warp_rows), num_warps=max(32 // warp_rows, 1))


def store_qkv(
    qkv: Tensor,
    bias: Tensor | None,
    shape: AttentionShape,
    query_norm: RmsNorm | None,
    key_norm: RmsNorm | None,
    angles: RotaryAngles,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    values_transposed: bool,
    launch: QkvLaunch,
) -> Tensor:
    """Writes keys and values of qkv [T, (num_heads + 2 num_kv_heads) * D] to the cache; returns the queries
    [T, num_heads, D], rotated, in the activation dtype, which is that of `angles`.

    qkv: in the activation dtype or float32, its rows at any distance; bias: one row to add, or None
    keys: [num_blocks, num_kv_heads, block_size, D], of floats or float8_e4m3fn
    values: as keys; if `values_transposed`, [num_blocks, num_kv_heads, D, block_size]
    slots: int64 [T]; block * block_size + offset, or negative for a token to leave out
    key_scale, value_scale: float32 [1], by which what is stored is divided; None divides by nothing

    Values that are not finite are stored as 0, since `kv_cache_layout` asks for finite ones.
    """
    tokens, pairs = qkv.shape[0], _num_pairs(shape.head_dim)
    query = torch.empty(tokens, shape.num_heads, shape.head_dim, dtype=angles.cos.dtype, device=qkv.device)
    programs = [triton.cdiv(tokens * n, launch.rows) for n in (shape.num_heads, shape.num_kv_heads)]
    launch_kernel(
        _qkv_kernel,
        (programs[0] + 2 * programs[1],),
        qkv,
        bias,
        query_norm and query_norm.weight,
        key_norm and key_norm.weight,
        angles.cos,
        angles.sin,
        slots,
        query,
        _storage(keys),
        _storage(values),
        key_scale,
        value_scale,
        tokens,
        qkv.stride(0),
        angles.cos.stride(0),
        angles.sin.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        query_norm.eps if query_norm else 0.0,
        key_norm.eps if key_norm else 0.0,
        NUM_HEADS=shape.num_heads,
        NUM_KV_HEADS=shape.num_kv_heads,
        HEAD_DIM=shape.head_dim,
        HALF=shape.rotary_dim // 2,
        BLOCK_SIZE=keys.shape[2],
        VALUES_TRANSPOSED=values_transposed,
        ROWS=launch.rows,
        PAIRS=pairs,
        RUN=gcd(shape.rotary_dim // 2, shape.head_dim // 2, 8),
        num_warps=launch.num_warps,
    )
    return query


def _num_pairs(head_dim: int) -> int:
    """Of a row, rounded up to a power of two."""
    if head_dim % 2:
        raise ValueError(f"heads of {head_dim} dimensions do not halve")
    return int(triton.next_power_of_2(head_dim // 2))


def _storage(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


@triton.jit
def _qkv_kernel(
    qkv_ptr,
    bias_ptr,
    query_norm_ptr,
    key_norm_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    num_tokens,
    qkv_stride,
    cos_stride,
    sin_stride,
    key_block_stride,
    key_head_stride,
    key_row_stride,
    value_block_stride,
    value_head_stride,
    value_row_stride,
    query_eps,
    key_eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VALUES_TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    RUN: tl.constexpr,
):
    query_programs = tl.cdiv(num_tokens * NUM_HEADS, ROWS)
    key_programs = tl.cdiv(num_tokens * NUM_KV_HEADS, ROWS)
    program = tl.program_id(0)
    columns = _paired_columns(HEAD_DIM, HALF, PAIRS, RUN)
    if program < query_programs:
        rows = program * ROWS + tl.arange(0, ROWS)
        tokens, heads = rows // NUM_HEADS, rows % NUM_HEADS
        mask = _mask(rows < num_tokens * NUM_HEADS, HEAD_DIM, PAIRS)
        x = _load_heads(qkv_ptr, bias_ptr, qkv_stride, tokens, heads, columns, mask, query_ptr, HEAD_DIM)
        x = _rms_norm(x, query_norm_ptr, query_eps, columns, mask, HEAD_DIM)
        x = _rotate(x, cos_ptr, cos_stride, sin_ptr, sin_stride, tokens, mask, HALF)
        _store_pair(query_ptr + rows.to(tl.int64)[:, None] * HEAD_DIM, columns, x, mask)
    elif program < query_programs + key_programs:
        rows = (program - query_programs) * ROWS + tl.arange(0, ROWS)
        tokens, heads = rows // NUM_KV_HEADS, rows % NUM_KV_HEADS
        mask = _mask(rows < num_tokens * NUM_KV_HEADS, HEAD_DIM, PAIRS)
        head_rows = NUM_HEADS + heads
        x = _load_heads(qkv_ptr, bias_ptr, qkv_stride, tokens, head_rows, columns, mask, query_ptr, HEAD_DIM)
        x = _rms_norm(x, key_norm_ptr, key_eps, columns, mask, HEAD_DIM)
        x = _rotate(x, cos_ptr, cos_stride, sin_ptr, sin_stride, tokens, mask, HALF)
        slots = tl.load(slots_ptr + tokens, mask=rows < num_tokens * NUM_KV_HEADS, other=-1)
        places = slots // BLOCK_SIZE * key_block_stride + heads * key_head_stride
        key_ptrs = keys_ptr + (places + slots % BLOCK_SIZE * key_row_stride)[:, None]
        _store_pair(key_ptrs, columns, _cached(x, key_scale_ptr, keys_ptr), mask & (slots >= 0)[:, None])
    else:
        rows = (program - query_programs - key_programs) * ROWS + tl.arange(0, ROWS)
        tokens, heads = rows // NUM_KV_HEADS, rows % NUM_KV_HEADS
        if VALUES_TRANSPOSED:  # neighbouring rows are then tokens, whose values lie side by side
            tokens, heads = rows % num_tokens, rows // num_tokens
        mask = _mask(rows < num_tokens * NUM_KV_HEADS, HEAD_DIM, PAIRS)
        head_rows = NUM_HEADS + NUM_KV_HEADS + heads
        x = _load_heads(qkv_ptr, bias_ptr, qkv_stride, tokens, head_rows, columns, mask, query_ptr, HEAD_DIM)
        slots = tl.load(slots_ptr + tokens, mask=rows < num_tokens * NUM_KV_HEADS, other=-1)
        places = slots // BLOCK_SIZE * value_block_stride + heads * value_head_stride
        x = (_finite(x[0]), _finite(x[1]))
        values, mask = _cached(x, value_scale_ptr, values_ptr), mask & (slots >= 0)[:, None]
        if VALUES_TRANSPOSED:
            value_ptrs = values_ptr + (places + slots % BLOCK_SIZE)[None, :]
            lines = (tl.trans(columns[0]) * value_row_stride, tl.trans(columns[1]) * value_row_stride)
            _store_pair(value_ptrs, lines, (tl.trans(values[0]), tl.trans(values[1])), tl.trans(mask))
        else:
            value_ptrs = values_ptr + (places + slots % BLOCK_SIZE * value_row_stride)[:, None]
            _store_pair(value_ptrs, columns, values, mask)


@triton.jit
def _finite(x):
    """0 for infinities and NaN: attention reads values of others beside its own and gives them weight 0."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def _paired_columns(HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, RUN: tl.constexpr):
    """int32 [1, PAIRS], twice. Both go up by one in runs of RUN, from a multiple of RUN on."""
    pairs = tl.arange(0, PAIRS)[None, :]
    turns = pairs < HALF
    firsts = tl.where(turns, pairs, pairs + HALF)
    seconds = tl.where(turns, pairs + HALF, pairs + HEAD_DIM // 2)
    firsts = tl.max_contiguous(tl.multiple_of(firsts, (1, RUN)), (1, RUN))
    seconds = tl.max_contiguous(tl.multiple_of(seconds, (1, RUN)), (1, RUN))
    return firsts, seconds


@triton.jit
def _mask(is_row, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    return is_row[:, None] & (tl.arange(0, PAIRS)[None, :] < HEAD_DIM // 2)


@triton.jit
def _load_pair(ptrs, columns, mask):
    first = tl.load(ptrs + columns[0], mask=mask, other=0.0)
    second = tl.load(ptrs + columns[1], mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pair(ptrs, columns, x, mask):
    tl.store(ptrs + columns[0], x[0], mask=mask)
    tl.store(ptrs + columns[1], x[1], mask=mask)


@triton.jit
def _load_heads(
    qkv_ptr, bias_ptr, qkv_stride, tokens, heads, columns, mask, query_ptr, HEAD_DIM: tl.constexpr
):
    starts = heads[:, None] * HEAD_DIM
    x = _load_pair(qkv_ptr + tokens.to(tl.int64)[:, None] * qkv_stride + starts, columns, mask)
    if bias_ptr is not None:
        bias = _load_pair(bias_ptr + starts, columns, mask)
        x = (x[0] + bias[0], x[1] + bias[1])
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    return x[0].to(dtype), x[1].to(dtype)


@triton.jit
def _rms_norm(x, weight_ptr, eps, columns, mask, HEAD_DIM: tl.constexpr):
    """x if weight_ptr is None."""
    if weight_ptr is None:
        return x
    else:
        wide = (x[0].to(tl.float32), x[1].to(tl.float32))
        mean = tl.sum(wide[0] * wide[0] + wide[1] * wide[1], 1) / HEAD_DIM
        inverse_rms = tl.rsqrt(mean + eps)[:, None]
        # Pointers for every row: a thread then loads the columns that it has, and nothing is exchanged.
        weight = _load_pair(weight_ptr + tl.zeros(mask.shape, tl.int32), columns, mask)
        dtype: tl.constexpr = x[0].dtype
        first = _product((wide[0] * inverse_rms).to(dtype), weight[0], dtype)
        second = _product((wide[1] * inverse_rms).to(dtype), weight[1], dtype)
        return first, second


@triton.jit
def _rotate(x, cos_ptr, cos_stride, sin_ptr, sin_stride, tokens, mask, HALF: tl.constexpr):
    pairs = tl.arange(0, mask.shape[1])[None, :]
    rows = tokens.to(tl.int64)[:, None]
    turns = mask & (pairs < HALF)
    cos = tl.load(cos_ptr + rows * cos_stride + pairs, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + rows * sin_stride + pairs, mask=turns, other=0.0)
    dtype: tl.constexpr = x[0].dtype
    first = _product(x[0], cos, dtype).to(tl.float32) - _product(x[1], sin, dtype).to(tl.float32)
    second = _product(x[1], cos, dtype).to(tl.float32) + _product(x[0], sin, dtype).to(tl.float32)
    return first.to(dtype), second.to(dtype)


@triton.jit
def _product(x, y, dtype: tl.constexpr):
    return (x.to(tl.float32) * y.to(tl.float32)).to(dtype)


@triton.jit
def _cached(x, scale_ptr, cache_ptr):
    """Both tensors of x over the scale, in the cache's dtype."""
    first, second = x[0].to(tl.float32), x[1].to(tl.float32)
    if scale_ptr is not None:
        inverse = tl.div_rn(1.0, tl.load(scale_ptr))
        first, second = first * inverse, second * inverse
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if dtype == tl.uint8:
        return e4m3_bits(first), e4m3_bits(second)
    else:
        return first.to(dtype), second.to(dtype)
