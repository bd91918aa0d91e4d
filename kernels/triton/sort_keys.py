"""Numbers and token ids as integers in the order of the search for the best: one maximum finds both.

The largest number wins, of equal ones the lowest id. NaN counts as larger than all numbers, so that it is
seen, and -0 as 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MAX_INT = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-(2**63))
"""Less than every packed key."""
MINUS_INFINITY_KEY = tl.constexpr(-0x7F800001)


@triton.jit
def sort_keys(x):
    """int32 keys of float32 numbers of any shape."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is 0
    return tl.where(x != x, _MAX_INT, bits ^ ((bits >> 31) & _MAX_INT))


@triton.jit
def key_numbers(keys):
    """The numbers of int32 keys."""
    return (keys ^ ((keys >> 31) & _MAX_INT)).to(tl.float32, bitcast=True)


@triton.jit
def packed(keys, ids):
    """int64 that order by key, int32, and equal keys by falling id, int32."""
    return (keys.to(tl.int64) << 32) | (ids ^ _MAX_INT)


@triton.jit
def packed_numbers(packed):
    return key_numbers((packed >> 32).to(tl.int32))


@triton.jit
def packed_ids(packed):
    """int32 ids."""
    return packed.to(tl.int32) ^ _MAX_INT
