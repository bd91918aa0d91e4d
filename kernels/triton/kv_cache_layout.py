"""The paged KV cache as the Triton kernels have it, and its conversion to and from the reference's.

                reference                          head-major
    keys        [blocks, block_size, heads, D]     [blocks, heads, block_size, D]
    values      [blocks, block_size, heads, D]     [blocks, heads, D, block_size]

A block of one head is one run of memory, so that attention reads a tile of keys or values from one address.
Values are transposed in it: sums over keys then run along memory for both products of attention, which loads
of several one-byte values at once need, and which costs two-byte values nothing.

Values must be finite in every slot, written or not. Attention reads blocks whole and gives weight 0 to what
is not of the context, but 0 * NaN is NaN. So a cache starts as zeros, and whoever writes values stores no NaN
and no infinity. Keys may be anything.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nybble.kernels.ops import KVCacheLayer


def new_head_major(
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCacheLayer:
    """An empty cache, of zeros."""
    lead = (num_blocks, num_kv_heads)
    return KVCacheLayer(
        keys=torch.zeros(*lead, block_size, head_dim, dtype=dtype, device=device),
        values=torch.zeros(*lead, head_dim, block_size, dtype=dtype, device=device),
    )


def to_head_major(cache: KVCacheLayer) -> KVCacheLayer:
    """A copy of a cache in the reference's layout."""
    return replace(
        cache,
        keys=cache.keys.permute(0, 2, 1, 3).contiguous(),
        values=cache.values.permute(0, 2, 3, 1).contiguous(),
    )


def from_head_major(cache: KVCacheLayer) -> KVCacheLayer:
    """The inverse of `to_head_major`."""
    return replace(
        cache,
        keys=cache.keys.permute(0, 2, 1, 3).contiguous(),
        values=cache.values.permute(0, 3, 1, 2).contiguous(),
    )
