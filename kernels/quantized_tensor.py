"""The one in-memory form of a quantized weight, whatever file layout it came from.

    weight[n, k] = element(code[n, k]) * scale[n, k // block_size]

An element is E2M1 (4 bits, two codes a byte, the low nibble the even column) or E4M3 (8 bits). The
scale of a block is made of up to two stored numbers:

    NVFP4                 E4M3 block scale * float32 global scale      (ModelOpt)
    NVFP4_DIVIDED         E4M3 block scale / float32 global scale      (compressed-tensors)
    MXFP4                 E8M0 block scale, a power of two
    FP8                   float32 global scale; the whole row is one block

Files store one global scale for a matrix (for FP8, for a row); here it is always one for a row, so that
matrices with different global scales (gate and up, or q, k and v) can be fused row-wise without touching a
code. Whether it multiplies or divides is kept as the file has it, since a reciprocal would round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# E2M1: sign, two exponent bits, one mantissa bit. Codes 8..15 are the negatives of 0..7.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
# Halfway points between neighbouring E2M1 magnitudes. A value is coded by how many it exceeds; at the
# second, fourth and sixth a tie goes up, to the even code.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)


@dataclass(frozen=True)
class Format:
    """block_size: columns that share a block scale; None if there is none but the row's global scale."""

    name: str
    bits: int
    block_size: int | None
    scale_dtype: torch.dtype | None
    has_global_scale: bool
    divides_by_global_scale: bool = False

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits == 4 else torch.float8_e4m3fn

    @property
    def codes_per_item(self) -> int:
        return 8 // self.bits


NVFP4 = Format("nvfp4", 4, 16, torch.float8_e4m3fn, has_global_scale=True)
NVFP4_DIVIDED = Format(
    "nvfp4-divided", 4, 16, torch.float8_e4m3fn, has_global_scale=True, divides_by_global_scale=True
)
MXFP4 = Format("mxfp4", 4, 32, torch.float8_e8m0fnu, has_global_scale=False)
FP8 = Format("fp8", 8, None, None, has_global_scale=True)


@dataclass(frozen=True)
class QuantizedTensor:
    """Weights of one matrix [rows, columns] or a stack of them [..., rows, columns].

    codes: uint8 [..., rows, columns / 2], or float8_e4m3fn [..., rows, columns]
    block_scales: format.scale_dtype [..., rows, columns / block_size], or None
    global_scales: float32 [..., rows], or None
    """

    codes: Tensor
    block_scales: Tensor | None
    global_scales: Tensor | None
    format: Format

    def __post_init__(self) -> None:
        *lead, columns = self.shape
        block_size = self.format.block_size
        if block_size and columns % block_size:
            raise ValueError(
                f"{columns} columns are not a multiple of the {self.format.name} block size {block_size}"
            )
        rows = tuple(lead)
        _check_part("codes", self.codes, self.format.code_dtype, self.codes.shape)
        blocks = (*rows, columns // block_size) if block_size else None
        _check_part("block_scales", self.block_scales, self.format.scale_dtype, blocks)
        scales = rows if self.format.has_global_scale else None
        _check_part("global_scales", self.global_scales, torch.float32, scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for: [..., rows, columns]."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * self.format.codes_per_item)

    @property
    def num_bytes(self) -> int:
        return sum(
            part.nbytes for part in (self.codes, self.block_scales, self.global_scales) if part is not None
        )

    def scales(self) -> Tensor:
        """float32 [..., rows, columns / block_size], or [..., rows, 1] if the row is one block."""
        if self.global_scales is None:
            return _present(self.block_scales).float()
        global_scales = self.global_scales.unsqueeze(-1)
        if self.block_scales is None:
            return global_scales
        block_scales = self.block_scales.float()
        is_divisor = self.format.divides_by_global_scale
        return block_scales / global_scales if is_divisor else block_scales * global_scales

    def row_factors(self) -> Tensor:
        """float32 [..., rows]: the global scales as factors, where dividing would not do; 1 without any."""
        if self.global_scales is None:
            return torch.ones(self.shape[:-1], device=self.codes.device)
        return 1 / self.global_scales if self.format.divides_by_global_scale else self.global_scales

    def __getitem__(self, index: int) -> QuantizedTensor:
        """A matrix of a stack, sharing its memory."""
        return replace(
            self,
            codes=self.codes[index],
            block_scales=None if self.block_scales is None else self.block_scales[index],
            global_scales=None if self.global_scales is None else self.global_scales[index],
        )

    def to(self, device: torch.device) -> QuantizedTensor:
        def move(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device)

        return replace(
            self,
            codes=self.codes.to(device),
            block_scales=move(self.block_scales),
            global_scales=move(self.global_scales),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [..., rows, columns]: computed in float32, rounded once to `dtype`.

        A stack is done one matrix at a time, so that float32 copies of only one exist at once.
        """
        if self.codes.ndim > 2:
            weights = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
            for index in range(self.codes.shape[0]):
                weights[index] = self[index].dequantize(dtype)
            return weights
        elements = unpack_codes(self.codes) if self.format.bits == 4 else self.codes.float()
        scales = self.scales()
        blocks = torch.unflatten(elements, -1, (scales.shape[-1], -1))
        return (blocks * scales.unsqueeze(-1)).flatten(-2).to(dtype)


def unpack_codes(codes: Tensor) -> Tensor:
    """float32 values [..., columns] of packed E2M1 codes, uint8 [..., columns / 2]."""
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    nibbles = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    return values[nibbles.int()]


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 [..., columns / 2] of E2M1 codes, uint8 [..., columns]."""
    return codes[..., 1::2] << 4 | codes[..., 0::2]


def nearest_codes(values: Tensor) -> Tensor:
    """uint8 codes of the E2M1 values nearest to float32 `values`: ties to the even code, beyond 6 to 6.

    An exact -0.0 becomes code 0, a negative value that rounds to zero code 8, as ModelOpt has it.
    """
    midpoints = torch.tensor(_MIDPOINTS, device=values.device)
    magnitudes = values.abs()
    codes = torch.bucketize(magnitudes, midpoints).to(torch.uint8)
    for tie in _TIES_UP:
        codes += magnitudes == tie
    return codes | (values < 0).to(torch.uint8) << 3


def concatenate_rows(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Fuse matrices of equal width, one below the other; bit for bit the same rows."""
    return QuantizedTensor(
        codes=torch.cat([t.codes for t in tensors], dim=-2),
        block_scales=_join([t.block_scales for t in tensors], lambda parts: torch.cat(parts, dim=-2)),
        global_scales=_join([t.global_scales for t in tensors], lambda parts: torch.cat(parts, dim=-1)),
        format=_common_format(tensors),
    )


def stack(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Stack matrices of equal shape on a new first dimension (the experts of a layer)."""
    return QuantizedTensor(
        codes=torch.stack([t.codes for t in tensors]),
        block_scales=_join([t.block_scales for t in tensors], torch.stack),
        global_scales=_join([t.global_scales for t in tensors], torch.stack),
        format=_common_format(tensors),
    )


def _join(parts: Sequence[Tensor | None], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return join(present) if present else None


def _common_format(tensors: Sequence[QuantizedTensor]) -> Format:
    formats = {t.format for t in tensors}
    if len(formats) != 1:
        raise ValueError(f"cannot join formats {sorted(f.name for f in formats)}")
    return formats.pop()


def _check_part(
    name: str, part: Tensor | None, dtype: torch.dtype | None, shape: Sequence[int] | None
) -> None:
    actual = "absent" if part is None else f"{part.dtype} {tuple(part.shape)}"
    expected = "absent" if shape is None else f"{dtype} {tuple(shape)}"
    if actual != expected:
        raise ValueError(f"{name} is {actual}, expected {expected}")


def _present(part: Tensor | None) -> Tensor:
    if part is None:
        raise ValueError("a quantized tensor has neither block scales nor global scales")
    return part
