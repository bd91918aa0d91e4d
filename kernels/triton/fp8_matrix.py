"""How FP8 weights lie in GPU memory for the Triton kernels, and the way back.

Codes stay where they are, row by row, padded with zeros to whole blocks of 64 columns. Activations come in
the order of `activation_order`, so that the 16 codes which a thread takes of a block are one load.

For bfloat16 the bits of each 32-bit word, which holds columns 4w .. 4w + 3 of a row, change places, so that
shifts and masks unpack two codes at a time, each 2^120 times too small:

    bits of each half      15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0
    low half               s0  m3  m3  m3  s2  e0  e0  e0  e0  m0  m0  m0  e2  e2  e2  e2
    high half              s1  m2  m2  m2  s3  e1  e1  e1  e1  m1  m1  m1  e3  e3  e3  e3

Code q is column 4w + q; s, e and m are the sign, exponent and mantissa bits of an E4M3 code, the highest
first, except that bit 3 has the lowest exponent bit of code 2 or 3. `x & 0x87F0` is code 0 or 1. Rotated by
8, and shifted left by 4, the word has all bits of codes 2 and 3 where they belong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.quantized_tensor import FP8, QuantizedTensor
from nybble.kernels.triton import activation_order

# Bits of a word of natural codes, and how far up or down they go.
_MOVES = (
    *((0x0000007F, 4), (0x00000080, 8)),
    *((0x00007F00, 12), (0x00008000, 16)),
    *((0x00070000, 12), (0x00080000, -16), (0x00700000, -20), (0x00800000, -12)),
    *((0x07000000, -12), (0x08000000, -8), (0x70000000, -12), (0x80000000, -4)),
)


@dataclass(frozen=True)
class Fp8Matrix:
    """A matrix [N, K].

    codes: uint8 [N, K'], K' is K padded to a multiple of 64
    row_scales: float32 [N]
    is_float16: codes are left natural, for hardware that converts E4M3 to float16 itself (8.9 and later)
    """

    codes: Tensor
    row_scales: Tensor
    is_float16: bool
    shape: tuple[int, int]

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        """K', the columns as stored."""
        return self.codes.shape[1]

    def natural_codes(self) -> Tensor:
        """float8_e4m3fn [N, K] as in a `QuantizedTensor`."""
        codes = self.codes if self.is_float16 else _swap_bits(self.codes, is_inverse=True)
        return codes[:, : self.shape[1]].view(torch.float8_e4m3fn)

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return self.natural_codes().float() * self.row_scales.unsqueeze(1)


def pack_fp8(weight: QuantizedTensor, is_float16: bool) -> Fp8Matrix:
    """The kernels' form of an FP8 matrix.

    Raises:
        ValueError: another format, a stack of matrices, or codes that are not numbers.
    """
    if weight.format is not FP8 or weight.codes.ndim != 2:
        raise ValueError(f"{weight.format.name} {list(weight.shape)} is not an FP8 matrix")
    codes = weight.codes.view(torch.uint8)
    if (codes & 0x7F == 0x7F).any():
        raise ValueError("codes must be numbers")
    num_rows, num_columns = weight.shape
    codes = F.pad(codes, (0, activation_order.padded_width(num_columns) - num_columns))
    return Fp8Matrix(
        codes=codes if is_float16 else _swap_bits(codes),
        row_scales=weight.row_factors(),
        is_float16=is_float16,
        shape=(num_rows, num_columns),
    )


def _swap_bits(codes: Tensor, is_inverse: bool = False) -> Tensor:
    """Move the bits of every four bytes of uint8 [N, 4 n] to their places in a word, or back."""
    words = codes.contiguous().view(torch.int32)
    swapped = torch.zeros_like(words)
    for mask, distance in _MOVES:
        swapped |= (
            _move(words, _moved(mask, distance), -distance) if is_inverse else _move(words, mask, distance)
        )
    return swapped.view(torch.uint8)


def _move(words: Tensor, mask: int, distance: int) -> Tensor:
    """The bits of `mask`, up by `distance`, or down; no mask that is used has the sign bit."""
    if distance > 0:
        return (words & mask) << distance
    return words >> -distance & _moved(mask, distance)


def _moved(mask: int, distance: int) -> int:
    return mask << distance if distance > 0 else mask >> -distance
