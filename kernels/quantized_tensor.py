"""The one in-memory form of a 4-bit weight, whatever file layout it came from.

    weight[n, k] = e2m1(code[n, k]) * block_scale[n, k // block_size] * global_scale[n]

Two codes share a byte: the low nibble is the even column. The files store one global scale per
matrix; here it is one per row, so that matrices with different global scales (gate and up, or q, k
and v) can be fused row-wise without touching a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# E2M1: sign, two exponent bits, one mantissa bit. Codes 8..15 are the negatives of 0..7.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX = 6.0


@dataclass(frozen=True)
class FP4Format:
    """How the block scales of an FP4 tensor are stored."""

    name: str
    block_size: int
    scale_dtype: torch.dtype


NVFP4 = FP4Format(name="nvfp4", block_size=16, scale_dtype=torch.float8_e4m3fn)


@dataclass(frozen=True)
class QuantizedTensor:
    """FP4 weights of one matrix [rows, columns] or a stack of them [..., rows, columns].

    codes: uint8 [..., rows, columns / 2]
    block_scales: format.scale_dtype [..., rows, columns / block_size]
    global_scales: float32 [..., rows]
    """

    codes: Tensor
    block_scales: Tensor
    global_scales: Tensor
    format: FP4Format

    def __post_init__(self) -> None:
        *lead, columns = self.shape
        expected = (
            ("codes", self.codes, torch.uint8, (*lead, columns // 2)),
            (
                "block_scales",
                self.block_scales,
                self.format.scale_dtype,
                (*lead, columns // self.format.block_size),
            ),
            ("global_scales", self.global_scales, torch.float32, tuple(lead)),
        )
        if columns % self.format.block_size:
            raise ValueError(
                f"{columns} columns are not a multiple of the {self.format.name} block size "
                f"{self.format.block_size}"
            )
        for name, tensor, dtype, shape in expected:
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for: [..., rows, columns]."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 2)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [..., rows, columns]: computed in float32, rounded once to `dtype`."""
        scales = self.block_scales.float() * self.global_scales.unsqueeze(-1)
        blocks = torch.unflatten(unpack_codes(self.codes), -1, (-1, self.format.block_size))
        return (blocks * scales.unsqueeze(-1)).flatten(-2).to(dtype)


def unpack_codes(codes: Tensor) -> Tensor:
    """float32 values [..., columns] of packed E2M1 codes, uint8 [..., columns / 2]."""
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    nibbles = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    return values[nibbles.int()]


def concatenate_rows(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Fuse matrices of equal width, one below the other; bit for bit the same rows."""
    return QuantizedTensor(
        codes=torch.cat([t.codes for t in tensors], dim=-2),
        block_scales=torch.cat([t.block_scales for t in tensors], dim=-2),
        global_scales=torch.cat([t.global_scales for t in tensors], dim=-1),
        format=_common_format(tensors),
    )


def stack(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Stack matrices of equal shape on a new first dimension (the experts of a layer)."""
    return QuantizedTensor(
        codes=torch.stack([t.codes for t in tensors]),
        block_scales=torch.stack([t.block_scales for t in tensors]),
        global_scales=torch.stack([t.global_scales for t in tensors]),
        format=_common_format(tensors),
    )


def _common_format(tensors: Sequence[QuantizedTensor]) -> FP4Format:
    formats = {t.format for t in tensors}
    if len(formats) != 1:
        raise ValueError(f"cannot join FP4 formats {sorted(f.name for f in formats)}")
    return formats.pop()
