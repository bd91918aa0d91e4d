"""The inline assembly of `fp4` in numpy, instruction for instruction."""

from __future__ import annotations

import numpy as np
import torch
from triton_assembly import register_assembly
from triton_numbers import Array

from nybble.kernels.quantized_tensor import E2M1_VALUES
from nybble.kernels.triton.fp4 import UNPACK_TO_BFLOAT16, UNPACK_TO_FLOAT16


def register() -> None:
    register_assembly(UNPACK_TO_BFLOAT16, _unpack_to_bfloat16)
    register_assembly(UNPACK_TO_FLOAT16, _unpack_to_float16)


def _unpack_to_bfloat16(words: Array, scales: Array, same_scales: Array) -> tuple[Array, ...]:
    assert (scales == same_scales).all()
    mask = np.uint32(0x81C081C0)
    fourth = words << 1 & np.uint32(0x80008000)
    fourth = words >> 3 & np.uint32(0x01800180) | fourth
    fourth = words >> 7 & np.uint32(0x00400040) | fourth
    codes = (words & mask, words << 3 & mask, words << 6 & mask, fourth)
    return tuple(_multiply(code, scales, torch.bfloat16) for code in codes)


def _unpack_to_float16(words: Array, scales: Array, same_scales: Array) -> tuple[Array, ...]:
    assert (scales == same_scales).all()
    values = np.array(E2M1_VALUES, np.float16).view(np.uint16).astype(np.uint32)
    pairs = [words >> 8 * i & 0xFF for i in range(4)]
    return tuple(_multiply(values[p & 15] | values[p >> 4] << 16, scales, torch.float16) for p in pairs)


def _multiply(words: Array, scales: Array, dtype: torch.dtype) -> Array:
    """Both halves of two words of 16-bit floats, rounded once."""
    left, right = (torch.from_numpy(w.copy().view(np.int16)).view(dtype).float() for w in (words, scales))
    return (left * right).to(dtype).view(torch.int16).numpy().view(np.uint32)
