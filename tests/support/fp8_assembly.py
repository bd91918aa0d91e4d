"""The inline assembly of `fp8_linear` in numpy, instruction for instruction."""

from __future__ import annotations

import numpy as np
import torch
from triton_assembly import register_assembly
from triton_numbers import Array

from nybble.kernels.triton.fp8_linear import UNPACK_TO_BFLOAT16, UNPACK_TO_FLOAT16


def register() -> None:
    register_assembly(UNPACK_TO_BFLOAT16, _unpack_to_bfloat16)
    register_assembly(UNPACK_TO_FLOAT16, _unpack_to_float16)


def _unpack_to_bfloat16(words: Array) -> tuple[Array, ...]:
    first = words & np.uint32(0x87F087F0)
    rotated = words << 8 | words >> 24
    second = words << 4 & np.uint32(0x80808080) | rotated & np.uint32(0x07700770)
    return _times_2_to_120(first), _times_2_to_120(second)


def _times_2_to_120(words: Array) -> Array:
    numbers = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).float()
    return (numbers * 2.0**120).bfloat16().view(torch.int16).numpy().view(np.uint32)


def _unpack_to_float16(words: Array) -> tuple[Array, ...]:
    codes = torch.from_numpy(np.ascontiguousarray(words).view(np.uint8)).view(torch.float8_e4m3fn)
    halves = codes.half().view(torch.int16).numpy().view(np.uint32)
    return halves[..., 0::2], halves[..., 1::2]
