"""The numbers behind the bit patterns of Triton's interpreter, and the roundings of a GPU between them.

A block of bfloat16 or float8 is a numpy array of uint16 or uint8 patterns, any other block of its own type.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import TensorHandle

Array = NDArray[Any]

FLOATS = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
PATTERNS = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8, tl.float8e5: torch.uint8}
_LARGEST_FLOAT8 = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}

silent = partial(np.errstate, all="ignore")
"""For what stands for an operation of the GPU, where no result raises a flag: `with silent():`."""


def is_pattern(handle: TensorHandle) -> bool:
    return handle.dtype.scalar in PATTERNS


def numbers_of(handle: TensorHandle) -> Array:
    """What numpy can compute with: bfloat16 and float8 as float32, all else as it is."""
    if not is_pattern(handle):
        return handle.data
    patterns = torch.from_numpy(np.array(handle.data, order="C"))
    return patterns.view(FLOATS[handle.dtype.scalar]).float().numpy()


def rounded_to(dtype: Any, numbers: Array) -> TensorHandle:
    """To nearest even, once; float8 saturates, infinities too (`cvt.rn.satfinite`), and keeps NaN."""
    if numbers.dtype == np.float64 and dtype not in (tl.float64, tl.float32):
        numbers = _float32_to_odd(numbers)  # torch goes through float32 itself, but rounds twice
    if dtype in _LARGEST_FLOAT8:
        numbers = np.clip(numbers, -_LARGEST_FLOAT8[dtype], _LARGEST_FLOAT8[dtype])
    rounded = torch.from_numpy(np.array(numbers, order="C")).to(FLOATS[dtype])
    return TensorHandle(rounded.view(PATTERNS.get(dtype, rounded.dtype)).numpy(), dtype)


def bfloat16_numbers(numbers: Array) -> Array:
    """float32 to the nearest bfloat16, as float32."""
    return numbers_of(rounded_to(tl.bfloat16, numbers))


def toward_zero(nearest: TensorHandle, numbers: Array) -> TensorHandle:
    """`numbers` rounded to `nearest`, now towards zero: patterns count up with the magnitude."""
    patterns = nearest.data.view(f"u{nearest.data.itemsize}")
    too_large = np.abs(numbers_of(nearest)) > np.abs(numbers)
    return TensorHandle((patterns - too_large.astype(patterns.dtype)).view(nearest.data.dtype), nearest.dtype)


def fused_multiply_add(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of float32 or less, as float64 rounded to odd: rounding that again is rounding once."""
    with silent():
        product, addend = x.astype(np.float64) * y, z.astype(np.float64)  # the product is exact
        total = product + addend
        added = total - product
        return _to_odd(total, (product - (total - added)) + (addend - added))


def integers_of(numbers: Array, dtype: np.dtype[Any]) -> Array:
    """As `cvt.rzi`: towards zero, clamped, NaN to 0. It has no 8-bit form: the low byte of 16 is taken."""
    limits = np.iinfo(f"{dtype.kind}{max(2, dtype.itemsize)}")
    with silent():
        integers = np.array(numbers, limits.dtype)
    integers[numbers >= 2.0 ** (limits.bits - (dtype.kind == "i"))] = limits.max
    integers[numbers <= limits.min] = limits.min
    integers[np.isnan(numbers)] = 0
    return integers.astype(dtype)


def _float32_to_odd(numbers: Array) -> Array:
    with silent():
        nearest = numbers.astype(np.float32)
        return _to_odd(nearest, numbers - nearest)


def _to_odd(nearest: Array, error: Array) -> Array:
    """Of the two numbers around an inexact result the one whose last bit is 1.

    It is on the exact result's side of every point halfway between two numbers of a type with fewer digits,
    so rounding it again gives what rounding once would have. `error` is the exact result less `nearest`;
    beside infinities it means nothing, and the largest number rounds as they do.
    """
    is_even = nearest.view(f"u{nearest.itemsize}") % 2 == 0
    other = np.nextafter(nearest, np.copysign(np.inf, error).astype(nearest.dtype))
    return np.where((error != 0) & is_even, other, nearest)
