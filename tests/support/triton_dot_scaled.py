"""The operands of `tl.dot_scaled` in Triton's interpreter, as the numbers they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton._C.libtriton import ir
from triton.runtime.interpreter import TensorHandle
from triton_numbers import Array, is_pattern, numbers_of, silent

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def unpacked(values: TensorHandle, form: Any, axis: int) -> Array:
    """An operand's numbers in float32; two e2m1 share a byte along `axis`, the first in the low bits."""
    if form != ir.ScaleDotElemTypeTY.E2M1:
        return numbers_of(values).astype(np.float32)
    codes = np.moveaxis(values.data.view(np.uint8), axis, -1)
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)
    return np.moveaxis(_E2M1[pairs.reshape(*codes.shape[:-1], -1)], -1, axis)


def scaled(numbers: Array, scale: TensorHandle | None) -> Array:
    """numbers [.., K] times their groups' scales [.., K / group], which are e4m3, or e8m0 as integers."""
    if scale is None:
        return numbers
    factors = numbers_of(scale) if is_pattern(scale) else _powers_of_two(scale.data)
    with silent():
        return numbers * np.repeat(factors, numbers.shape[-1] // factors.shape[-1], axis=-1)


def _powers_of_two(codes: Array) -> Array:
    codes = np.array(codes.view(np.uint8), order="C")
    return torch.from_numpy(codes).view(torch.float8_e8m0fnu).float().numpy()
