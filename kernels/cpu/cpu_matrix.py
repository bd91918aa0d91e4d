"""The native CPU backend's form of a weight matrix, or of a stack of them, and the way back.

native/matrix.h has the layout: tiles of 16 rows, blocks of 32 columns, both padded with zeros. FP4 codes keep
their bytes, which only change places; block scales keep theirs. Other matrices are held as int8 with a scale
for each 32 columns, or as bfloat16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.quantized_tensor import NVFP4, NVFP4_DIVIDED, QuantizedTensor, unpack_codes

TILE_ROWS, BLOCK_COLUMNS = 16, 32
FloatForm = Literal["int8", "bf16"]
_ROWS_AT_ONCE = 64 * TILE_ROWS  # that are float32 at a time while they are quantized


class Kind(IntEnum):
    """The order of nybble_matrix_kind in native/matrix.h."""

    FP4_BY_16 = 0
    FP4_BY_32 = 1
    INT8 = 2
    BFLOAT16 = 3
    FLOAT32 = 4


# Of a block of 16 rows x 32 columns, by kind.
_CODE_BYTES = (256, 256, 512, 1024, 2048)
_SCALE_BYTES = (32, 16, 32, 0, 0)
# What a row scale makes up for: codes have twice their value; an E4M3 byte is read as a float16, 2^-8 of it.
_ROW_FACTORS = {Kind.FP4_BY_16: 2.0**7, Kind.FP4_BY_32: 0.5}


class _NativeMatrix(ctypes.Structure):
    """struct nybble_matrix."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("num_matrices", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    )


@dataclass(frozen=True)
class CpuMatrix:
    """A matrix of `shape` [N, K], or a stack [E, N, K], which has E = 1 below without.

    codes: uint8 [E, ceil(N / 16), ceil(K / 32), bytes of a block]
    scales: uint8 [E, ceil(N / 16), ceil(K / 32), bytes of a block]
    row_scales: float32 [E, ceil(N / 16) * 16]

    Float kinds have no scales: both tensors are empty.
    """

    kind: Kind
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    row_scales: Tensor
    _native: _NativeMatrix = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pointers = (self.codes.data_ptr(), self.scales.data_ptr(), self.row_scales.data_ptr())
        sizes = (self.num_matrices, self.num_rows, self.num_columns)
        object.__setattr__(self, "_native", _NativeMatrix(*pointers, *sizes, self.kind))

    @property
    def num_matrices(self) -> int:
        return self.codes.shape[0]

    @property
    def num_rows(self) -> int:
        return self.shape[-2]

    @property
    def num_columns(self) -> int:
        return self.shape[-1]

    @property
    def address(self) -> int:
        """Of its struct nybble_matrix, as long as this lives."""
        return ctypes.addressof(self._native)

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.row_scales.nbytes


def prepare(weight: Tensor | QuantizedTensor, float_form: FloatForm = "int8") -> CpuMatrix:
    """A matrix [N, K] or a stack [E, N, K]. FP4 stays FP4; float_form says what all else becomes.

    Raises:
        ValueError: it has another number of dimensions, or none of something, or is not on the CPU.
    """
    shape = tuple(weight.shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(
            f"a weight is {list(shape)}; the native CPU backend takes [N, K] or [E, N, K], not empty"
        )
    device = weight.codes.device if isinstance(weight, QuantizedTensor) else weight.device
    if device.type != "cpu":
        raise ValueError(f"a weight is on {device}; the native CPU backend takes weights on the CPU")
    kind = _kind_of(weight, float_form)
    matrix = _empty(kind, shape)
    for index in range(matrix.num_matrices):
        one = weight[index] if len(shape) == 3 else weight
        if isinstance(one, QuantizedTensor) and one.format.bits == 4:
            _write_fp4(one, matrix, index)
        else:
            _write_floats(one, matrix, index)
    return matrix


def prepare_float32(weight: Tensor) -> CpuMatrix:
    """A float matrix [N, K] as float32, for products that must not be rounded: a router's."""
    matrix = _empty(Kind.FLOAT32, tuple(weight.shape))
    matrix.codes.view(torch.float32).copy_(
        _float32_lines(weight.float()).view((*matrix.codes.shape[:-1], -1))
    )
    return matrix


def dequantize(matrix: CpuMatrix) -> Tensor:
    """float32 of the matrix's shape: exactly what it stands for."""
    weights = torch.stack([_dequantize_one(matrix, index) for index in range(matrix.num_matrices)])
    return weights[:, : matrix.num_rows, : matrix.num_columns].reshape(matrix.shape).contiguous()


def _kind_of(weight: Tensor | QuantizedTensor, float_form: FloatForm) -> Kind:
    if isinstance(weight, QuantizedTensor) and weight.format.bits == 4:
        return Kind.FP4_BY_16 if weight.format in (NVFP4, NVFP4_DIVIDED) else Kind.FP4_BY_32
    return Kind.INT8 if float_form == "int8" else Kind.BFLOAT16


def _empty(kind: Kind, shape: tuple[int, ...]) -> CpuMatrix:
    *stack, rows, columns = shape
    tiles, blocks = -(-rows // TILE_ROWS), -(-columns // BLOCK_COLUMNS)
    num_matrices = stack[0] if stack else 1
    has_scales = _SCALE_BYTES[kind] > 0
    return CpuMatrix(
        kind,
        shape,
        codes=torch.empty((num_matrices, tiles, blocks, _CODE_BYTES[kind]), dtype=torch.uint8),
        scales=torch.empty((num_matrices, tiles, blocks, _SCALE_BYTES[kind]), dtype=torch.uint8),
        row_scales=torch.empty((num_matrices, tiles * TILE_ROWS if has_scales else 0)),
    )


def _padded(part: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(part, (0, columns - part.shape[1], 0, rows - part.shape[0])).contiguous()


# FP4.


def _write_fp4(weight: QuantizedTensor, matrix: CpuMatrix, index: int) -> None:
    _, tiles, blocks, _ = matrix.codes.shape
    rows, columns = tiles * TILE_ROWS, blocks * BLOCK_COLUMNS
    block_scales, codes, is_nan = _positive(weight)
    words = _padded(codes, rows, columns // 2).view(torch.int32)  # of 8 columns
    lines = matrix.codes[index].view(torch.int32).view(tiles, -1, TILE_ROWS)
    lines.copy_(words.view(tiles, TILE_ROWS, -1).transpose(1, 2))
    scales = _padded(block_scales, rows, matrix.scales.shape[-1] // TILE_ROWS * blocks)
    matrix.scales[index].view(tiles, -1, TILE_ROWS).copy_(scales.view(tiles, TILE_ROWS, -1).transpose(1, 2))
    row_scales = (weight.row_factors() * _ROW_FACTORS[matrix.kind]).masked_fill(is_nan, torch.nan)
    matrix.row_scales[index].copy_(F.pad(row_scales, (0, rows - len(row_scales))))


def _positive(weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Block scales uint8 [N, blocks] without signs; codes that have them; which rows have a scale NaN."""
    assert weight.block_scales is not None
    scales = weight.block_scales.view(torch.uint8)
    if _SCALE_BYTES[_kind_of(weight, "int8")] == TILE_ROWS:  # E8M0 has no signs
        return scales, weight.codes, (scales == 0xFF).any(dim=-1)
    is_nan = ((scales & 0x7F) == 0x7F).any(dim=-1)
    is_negative = scales > 0x7F
    if not is_negative.any():
        return scales, weight.codes, is_nan
    flips = (is_negative * 0x88).to(torch.uint8).repeat_interleave(8, dim=-1)  # both codes of a byte
    return scales & 0x7F, weight.codes ^ flips, is_nan


# Floats.


def _write_floats(weight: Tensor | QuantizedTensor, matrix: CpuMatrix, index: int) -> None:
    for start, rows in _float_rows(weight):
        tiles = slice(start // TILE_ROWS, -(-(start + len(rows)) // TILE_ROWS))
        if matrix.kind is Kind.BFLOAT16:
            lines = _pair_lines(rows.bfloat16()).view(torch.uint8)
        else:
            codes, scales, row_scales = _quantized(rows)
            lines = _int8_lines(codes)
            matrix.scales[index, tiles].copy_(scales)
            matrix.row_scales[index, tiles.start * TILE_ROWS : tiles.stop * TILE_ROWS].copy_(row_scales)
        matrix.codes[index, tiles].copy_(lines.reshape(matrix.codes[index, tiles].shape))


def _float_rows(weight: Tensor | QuantizedTensor) -> Iterator[tuple[int, Tensor]]:
    """A matrix as float32 [up to _ROWS_AT_ONCE, K], with the number of the first row."""
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        if isinstance(weight, Tensor):
            yield start, weight[rows].float()
        else:
            assert weight.global_scales is not None  # as FP8 has, and no block scales
            yield start, weight.codes[rows].float() * weight.global_scales[rows].unsqueeze(-1)


def _blocks(rows: Tensor) -> Tensor:
    """[tiles, 16, blocks, 32] of rows [n, K], padded with zeros."""
    tiles, blocks = -(-rows.shape[0] // TILE_ROWS), -(-rows.shape[1] // BLOCK_COLUMNS)
    padded = _padded(rows, tiles * TILE_ROWS, blocks * BLOCK_COLUMNS)
    return padded.view(tiles, TILE_ROWS, blocks, BLOCK_COLUMNS)


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes uint8 [tiles, 16, blocks, 32]; float16 scales as uint8 [tiles, blocks, 32]; row scales [rows].

    A row's largest block scale is its row scale, so that float16 is precise where it matters. Rows that have
    a number that is not finite have row scale NaN.
    """
    blocks = _blocks(rows)
    wanted = blocks.abs().amax(dim=-1) / 127  # [tiles, 16, blocks]
    row_scales = wanted.amax(dim=-1)
    ratios = (wanted / row_scales.masked_fill(row_scales == 0, 1).unsqueeze(-1)).nan_to_num().half()
    steps = ratios.float() * row_scales.unsqueeze(-1)
    levels = blocks / steps.masked_fill(steps == 0, torch.inf).unsqueeze(-1)
    codes = (levels.nan_to_num().round().clamp(-127, 127) + 128).to(torch.uint8)
    row_scales = row_scales.masked_fill(~row_scales.isfinite(), torch.nan)
    return codes, ratios.transpose(1, 2).contiguous().view(torch.uint8), row_scales.flatten()


def _int8_lines(codes: Tensor) -> Tensor:
    """[tiles, blocks, 4 x (even, odd), 16 rows, 4] of codes [tiles, 16, blocks, 32]."""
    return torch.unflatten(codes, -1, (4, 4, 2)).permute(0, 2, 3, 5, 1, 4)


def _pair_lines(rows: Tensor) -> Tensor:
    """[tiles, blocks, 16 pairs, 16 rows, 2] of rows [n, K]."""
    return torch.unflatten(_blocks(rows), -1, (-1, 2)).permute(0, 2, 3, 1, 4).contiguous()


def _float32_lines(rows: Tensor) -> Tensor:
    """[tiles, blocks, 32 columns, 16 rows] of rows [n, K]."""
    return _blocks(rows).permute(0, 2, 3, 1).contiguous()


# The way back.


def _dequantize_one(matrix: CpuMatrix, index: int) -> Tensor:
    """float32 [rows and columns as padded]."""
    codes = matrix.codes[index]
    tiles, blocks, _ = codes.shape
    if matrix.kind is Kind.FLOAT32:
        elements = codes.view(torch.float32).view(tiles, blocks, BLOCK_COLUMNS, TILE_ROWS).permute(0, 3, 1, 2)
    elif matrix.kind is Kind.BFLOAT16:
        pairs = codes.view(torch.bfloat16).view(tiles, blocks, -1, TILE_ROWS, 2)
        elements = pairs.permute(0, 3, 1, 2, 4).float()
    else:
        elements = _elements(matrix.kind, codes) * _column_scales(matrix, index)
    return elements.reshape(tiles * TILE_ROWS, blocks * BLOCK_COLUMNS)


def _elements(kind: Kind, codes: Tensor) -> Tensor:
    """float32 [tiles, 16, blocks, 32]: what codes stand for, times two if they are E2M1."""
    tiles, blocks, _ = codes.shape
    if kind is Kind.INT8:
        lines = codes.view(tiles, blocks, 4, 2, TILE_ROWS, 4).permute(0, 4, 1, 2, 5, 3)
        return lines.reshape(tiles, TILE_ROWS, blocks, BLOCK_COLUMNS).float() - 128
    words = codes.view(tiles, blocks, 4, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
    return 2 * unpack_codes(words.reshape(tiles, TILE_ROWS, blocks, BLOCK_COLUMNS // 2))


def _column_scales(matrix: CpuMatrix, index: int) -> Tensor:
    """float32 [tiles, 16, blocks, 32]: block scale times row scale of each weight."""
    stored = matrix.scales[index]
    tiles, blocks, _ = stored.shape
    if matrix.kind is Kind.INT8:
        scales = stored.view(torch.float16).float()
    elif matrix.kind is Kind.FP4_BY_16:
        scales = stored.view(torch.float8_e4m3fn).float() / 2**8
    else:
        scales = stored.view(torch.float8_e8m0fnu).float()
    by_row = scales.view(tiles, -1, TILE_ROWS).transpose(1, 2)
    scaled = by_row * matrix.row_scales[index].view(tiles, TILE_ROWS, 1)
    size = blocks * BLOCK_COLUMNS // scaled.shape[-1]
    return scaled.repeat_interleave(size, dim=-1).view(tiles, TILE_ROWS, blocks, BLOCK_COLUMNS)
