"""Randomness by counter: a function of a seed, a position and a token, with no generator to carry along.

So a request draws the same numbers alone, in a batch, or computed again after preemption. The hash is
the output function of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", 2014) over its n-th state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK64 = (1 << 64) - 1


def draw_bits(seed: int, position: int) -> int:
    """64 bits for the token at `position`, as a signed integer (torch has no unsigned arithmetic)."""
    state = (_mix(seed & _MASK64) + (position + 1) * _STEP) & _MASK64
    return _signed(_mix(state))


def draw_bits_of(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """`draw_bits` of many at once: of seeds uint64 [S] and positions [S], int64 [S]."""
    states = _mix_array(seeds) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_STEP)
    return _mix_array(states).view(np.int64)


def gumbel(draws: Tensor, count: int) -> Tensor:
    """float64 [S, count] of standard Gumbel noise, row s from the 64 bits draws[s] of int64 [S]."""
    counters = torch.arange(1, count + 1, dtype=torch.int64, device=draws.device)
    bits = _mix_tensor(draws.unsqueeze(-1) + counters * _signed(_STEP))
    # The upper 52 bits, at the middle of their interval, which float64 holds exactly: neither 0 nor 1.
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()


def _mix(value: int) -> int:
    value = (value ^ value >> 30) * _FIRST & _MASK64
    value = (value ^ value >> 27) * _SECOND & _MASK64
    return value ^ value >> 31


def _mix_array(value: np.ndarray) -> np.ndarray:
    """`_mix` of uint64 arrays."""
    value = (value ^ value >> np.uint64(30)) * np.uint64(_FIRST)
    value = (value ^ value >> np.uint64(27)) * np.uint64(_SECOND)
    mixed: np.ndarray = value ^ value >> np.uint64(31)
    return mixed


def _mix_tensor(value: Tensor) -> Tensor:
    """`_mix` of int64 tensors, whose products wrap as those of unsigned integers do."""
    value = (value ^ _shift_right(value, 30)) * _signed(_FIRST)
    value = (value ^ _shift_right(value, 27)) * _signed(_SECOND)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, count: int) -> Tensor:
    """Shift in zeros, as for unsigned integers."""
    return value >> count & (1 << (64 - count)) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
