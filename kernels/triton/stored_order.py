"""`activation_order` inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stored_at(k, FRAGMENT_ORDER: tl.constexpr):
    """Where natural column k is stored: int tensor of any shape, to the same."""
    if FRAGMENT_ORDER:
        return (k & ~63) | ((k & 0xE) << 2) | ((k >> 3) & 6) | (k & 1)
    return k
