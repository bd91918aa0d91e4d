"""The order of columns in which activations meet FP4 weights on architectures without FP4 instructions.

A matrix instruction of 16 x 16 (`mma.m16n8k16`, `wgmma`) wants of each row, in thread t of four, columns
2t, 2t+1, 2t+8 and 2t+9: scattered for weights of four bits, which one would load as long runs. But a sum
over k may be taken in any order. So weights stay in their natural order, of which thread t takes a run of 16
columns in every 64, and the activations are permuted instead, once, by the kernel that makes them:

    natural column   k = 64 b + 16 t + 2 c + j      t < 4, c < 8, j < 2
    stored at            64 b +  8 c + 2 t + j

A block of 16 columns, which share an NVFP4 scale, is then one thread's run.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64


def to_fragment_order(x: Tensor) -> Tensor:
    """x [..., K] with its columns in fragment order; K is a multiple of 64."""
    return torch.unflatten(x, -1, (-1, 4, 8, 2)).transpose(-3, -2).flatten(-4)


def from_fragment_order(x: Tensor) -> Tensor:
    """The inverse of `to_fragment_order`."""
    return torch.unflatten(x, -1, (-1, 8, 4, 2)).transpose(-3, -2).flatten(-4)


def padded_width(width: int) -> int:
    """Columns of an activation of `width` columns, padded with zeros to whole blocks."""
    return -(-width // BLOCK) * BLOCK
