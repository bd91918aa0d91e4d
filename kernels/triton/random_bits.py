"""`random_bits` inside kernels: the same bits, and a race that has the winner of its Gumbel noise.

The token with the largest x + gumbel, gumbel = -log(e) with e = -log(u), is the one with the smallest
e * exp(-x): as if tokens arrived at random times, each with the rate exp(x). That takes one logarithm less,
and float32 keeps more of it, since a product's error is relative.
"""

from __future__ import annotations

import triton
import triton.language as tl

_STEP = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def token_bits(draw, ids):
    """uint64 bits for each of the token ids, int32 of any shape, from a row's 64, an int64."""
    bits = draw.to(tl.uint64, bitcast=True) + (ids.to(tl.uint64) + 1) * _STEP
    bits = (bits ^ (bits >> 30)) * _FIRST
    bits = (bits ^ (bits >> 27)) * _SECOND
    return bits ^ (bits >> 31)


@triton.jit
def exponential(bits):
    """float32 -log(u) of uint64 bits, u as in `random_bits.gumbel`, with a relative error below 4e-7.

    The early ones, which win, come from u next to 1, where float32 has few numbers. So u is taken by its
    distance from the nearer of 0 and 1, which keeps 24 bits; and where that is 1, what rounding took from u
    is given back to its logarithm.
    """
    high, low = (bits >> 32).to(tl.uint32), (bits >> 12).to(tl.uint32)
    is_near_one = high >= 0x80000000
    high = tl.where(is_near_one, high ^ 0xFFFFFFFF, high)
    low = tl.where(is_near_one, low ^ 0xFFFFF, low) & 0xFFFFF
    distance = high.to(tl.float32) * 2.0**-32 + (low.to(tl.float32) + 0.5) * 2.0**-52
    u = tl.where(is_near_one, 1.0 - distance, distance)
    taken = tl.where(is_near_one, distance - (1.0 - u), 0.0)
    return taken - tl.log(u)
