"""How FP4 weights lie in GPU memory for the Triton kernels, and the way back.

Codes stay where they are, row by row, padded with zeros to whole blocks of 64 columns (the activations are
permuted instead, see `activation_order`). Without FP4 instructions (compute capability below 10.0) only the
bits of each 32-bit word, which holds columns 8w .. 8w + 7 of a row, change places, so that shifts and masks
unpack two codes at a time to bfloat16, each 2^126 times too small:

    bits of each half      15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0
    code                   s0  s3  m3  s1  e3  e3  s2  e0  e0  m0  e1  e1  m1  e2  e2  m2

Code q of half j is column 8w + 2q + j; s, e and m are the sign, exponent and mantissa bits of an E2M1 code.
`x & 0x81C0` is code 0, `x << 3` and `x << 6` bring codes 1 and 2 there, and code 3 takes the bits left over.

Scales are bytes that expand to a 16-bit float by shifts; what does not fit in them is in `row_scales`:

    bfloat16 NVFP4    byte = exponent and mantissa of scale * 2^118, of which 0x7000 is implied     row *= 2^8
    bfloat16 MXFP4    byte = exponent field of scale * 2^126                                        row *= 2^r
    float16  NVFP4    byte = the E4M3 scale, read as float16: scale * 2^-8                          row *= 2^8
    float16  MXFP4    byte = exponent field of scale * 2^r                                          row *=
    2^-r

All products of code and scale are exact in the 16-bit float. r is 0 for bfloat16 unless a row has a scale
above 2; in float16 it puts the largest scale of the row at 2^9, and scales 2^24 times smaller than that count
as zero.

A thread that multiplies a row by columns 16t .. 16t + 15 of every 64 needs a scale for each: those of four
times 64 columns are one word. Of 256 columns of 16 rows, which lie together, word (r, t) belongs to row r,
and its byte b to columns 64b + 16t .. 64b + 16t + 15. MXFP4, with half as many scales, has words (r, t / 2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.quantized_tensor import MXFP4, QuantizedTensor, unpack_codes
from nybble.kernels.triton import activation_order

# Where bits 0..3 (mantissa, exponent, exponent, sign) of code q of a half go.
_BIT_PLACES = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (13, 10, 11, 14))
# Exponent field of a row's largest MXFP4 scale: 2^9, and 6 * 2^9 is far from overflow.
_FLOAT16_TOP = 24


@dataclass(frozen=True)
class Fp4Matrix:
    """A matrix [N, K] or a stack of them [E, N, K].

    codes: uint8 [..., N, K' / 2], K' is K padded to a multiple of 64
    scale_words: int32 [..., N' / 16, ceil(K' / 256), P], N' is N padded to a multiple of 16; P is 64 or 32
    row_scales: float32 [..., N]
    block_size: columns that share a scale: 16 (NVFP4) or 32 (MXFP4)
    is_float16: codes are left natural and scales are float16's, for hardware that converts E2M1 itself
    """

    codes: Tensor
    scale_words: Tensor
    row_scales: Tensor
    block_size: int
    is_float16: bool
    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[-2]

    @property
    def width(self) -> int:
        """K', the columns as stored."""
        return 2 * self.codes.shape[-1]

    def __getitem__(self, index: int) -> Fp4Matrix:
        return replace(
            self,
            codes=self.codes[index],
            scale_words=self.scale_words[index],
            row_scales=self.row_scales[index],
            shape=self.shape[1:],
        )

    def natural_codes(self) -> Tensor:
        """uint8 [..., N, K / 2] as in a `QuantizedTensor`, but zero where the scale was."""
        codes = self.codes if self.is_float16 else _swap_bits(self.codes, is_inverse=True)
        return codes[..., : self.shape[-1] // 2]

    def scales(self) -> Tensor:
        """float32 [..., N, K / block_size]: what codes are multiplied by. Zero may come back as another
        number, and its codes as zero."""
        scale_bytes = _from_words(self.scale_words, self.block_size)
        scale_bytes = scale_bytes[..., : self.num_rows, : self.shape[-1] // self.block_size]
        return self._expand(scale_bytes) * self.row_scales.unsqueeze(-1)

    def dequantize(self) -> Tensor:
        """float32 [..., N, K]: the weight as the kernels see it."""
        blocks = torch.unflatten(unpack_codes(self.natural_codes()), -1, (-1, self.block_size))
        return (blocks * self.scales().unsqueeze(-1)).flatten(-2)

    def _expand(self, scale_bytes: Tensor) -> Tensor:
        """float32 values of int32 bytes as the kernels expand them; see above."""
        if self.is_float16:
            shift = 7 if self.block_size == 16 else 10
            return (scale_bytes << shift).to(torch.int16).view(torch.float16).float()
        bits = scale_bytes << 4 | 0x7000 if self.block_size == 16 else scale_bytes << 7
        return bits.to(torch.int16).view(torch.bfloat16).float() * 2.0**-126


def pack_fp4(weight: QuantizedTensor, is_float16: bool) -> Fp4Matrix:
    """The kernels' form of an NVFP4 or MXFP4 weight, matrix or stack.

    Raises:
        ValueError: another format, or scales that are negative or not numbers.
    """
    if weight.codes.ndim > 2:
        return _stack([pack_fp4(weight[index], is_float16) for index in range(weight.codes.shape[0])])
    block_size, scales = weight.format.block_size, weight.block_scales
    if weight.format.bits != 4 or block_size is None or scales is None:
        raise ValueError(f"{weight.format.name} is not a four-bit format with block scales")
    if not (scales.float() >= 0).all():
        raise ValueError("block scales must be numbers and not negative")
    fold = _fold_powers if weight.format is MXFP4 else _fold_e4m3
    scale_bytes, row_scales = fold(weight, scales, is_float16)
    is_zero = (scales.float() == 0).repeat_interleave(block_size // 2, dim=-1)
    width = activation_order.padded_width(weight.shape[-1])
    codes = F.pad(weight.codes.masked_fill(is_zero, 0), (0, width // 2 - weight.codes.shape[-1]))
    return Fp4Matrix(
        codes=codes if is_float16 else _swap_bits(codes),
        scale_words=_to_words(scale_bytes, block_size),
        row_scales=row_scales,
        block_size=block_size,
        is_float16=is_float16,
        shape=weight.shape,
    )


def _stack(matrices: list[Fp4Matrix]) -> Fp4Matrix:
    return replace(
        matrices[0],
        codes=torch.stack([matrix.codes for matrix in matrices]),
        scale_words=torch.stack([matrix.scale_words for matrix in matrices]),
        row_scales=torch.stack([matrix.row_scales for matrix in matrices]),
        shape=(len(matrices), *matrices[0].shape),
    )


def _swap_bits(codes: Tensor, is_inverse: bool = False) -> Tensor:
    """Move the bits of every four bytes of uint8 [..., 4 n] to their places in a word, or back."""
    words = codes.contiguous().view(torch.int32)
    swapped = torch.zeros_like(words)
    for half, (code, places) in product(range(2), enumerate(_BIT_PLACES)):
        for bit, place in enumerate(places):
            natural, packed = 8 * code + 4 * half + bit, 16 * half + place
            source, target = (packed, natural) if is_inverse else (natural, packed)
            swapped |= (words >> source & 1) << target
    return swapped.view(torch.uint8)


def _fold_e4m3(weight: QuantizedTensor, scales: Tensor, is_float16: bool) -> tuple[Tensor, Tensor]:
    """NVFP4: bytes, int32 [N, K / 16], and what they lack, float32 [N]."""
    if is_float16:
        scale_bytes = scales.view(torch.uint8).int()
    else:
        scale_bytes = (scales.float() * 2.0**118).bfloat16().view(torch.int16).int() >> 4 & 0xFF
    return scale_bytes, 2.0**8 * weight.row_factors()


def _fold_powers(weight: QuantizedTensor, scales: Tensor, is_float16: bool) -> tuple[Tensor, Tensor]:
    """MXFP4: bytes, int32 [N, K / 32], and what they lack, float32 [N]."""
    exponents = scales.view(torch.uint8).int()
    largest = exponents.amax(dim=-1)
    if is_float16:
        removed, top = largest - 127 - 9, _FLOAT16_TOP - largest
    else:
        removed, top = (largest - 128).clamp(min=0), 126 - (largest - 128).clamp(min=0)
    scale_bytes = (exponents + top.unsqueeze(-1)).clamp(min=0)
    return scale_bytes, torch.ones_like(removed, dtype=torch.float32).ldexp(removed)


def _to_words(scale_bytes: Tensor, block_size: int) -> Tensor:
    """int32 [N, K / block_size] of bytes as int32 [N' / 16, ceil(K / 256), P]."""
    num_rows, num_blocks = scale_bytes.shape
    per_64 = 64 // block_size
    padded = F.pad(scale_bytes, (0, -num_blocks % (4 * per_64), 0, -num_rows % 16)).to(torch.uint8)
    # [N' / 16, r, K / 256, b, t] -> [N' / 16, K / 256, r, t, b]
    parts = padded.view(-1, 16, padded.shape[1] // (4 * per_64), 4, per_64).permute(0, 2, 1, 4, 3)
    return parts.reshape(*parts.shape[:2], -1).view(torch.int32)


def _from_words(words: Tensor, block_size: int) -> Tensor:
    """The inverse of `_to_words`, padding included: int32 [..., N', K'' / block_size]."""
    *lead, num_rows_16, num_blocks_256, _ = words.shape
    per_64 = 64 // block_size
    parts = words.contiguous().view(torch.uint8).view(-1, num_blocks_256, 16, per_64, 4)
    natural = parts.permute(0, 2, 1, 4, 3).reshape(*lead, 16 * num_rows_16, -1)
    return natural.int()
