"""The native CPU backend's form of a weight matrix, or of a stack of them, and the way back.

native/matrix.h has the layout: tiles of 16 rows, blocks of 32 columns, both padded with zeros. FP4 and FP8
codes keep their bytes, which only change places; block scales keep theirs. Other matrices are held as int8
with a scale for each 32 columns, or as bfloat16.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.cpu.native_library import native_library
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.weight_memory import WeightMemory
from nybble.kernels.quantized_tensor import FP8, MXFP4, QuantizedTensor, unpack_codes

TILE_ROWS, BLOCK_COLUMNS = 16, 32
FloatForm = Literal["int8", "bf16"]


class Kind(IntEnum):
    """The order of nybble_matrix_kind in native/matrix.h."""

    FP4_BY_16 = 0
    FP4_BY_32 = 1
    INT8 = 2
    FP8 = 3
    BFLOAT16 = 4
    FLOAT32 = 5


# Of a block of 16 rows x 32 columns, by kind.
_CODE_BYTES = (256, 256, 512, 512, 1024, 2048)
_SCALE_BYTES = (32, 16, 32, 0, 0, 0)
# What a row scale makes up for: E2M1 codes have twice their value; E4M3 bytes, read as float16, 2^-8 of it.
_ROW_FACTORS = {Kind.FP4_BY_16: 2.0**7, Kind.FP4_BY_32: 0.5, Kind.FP8: 2.0**8}


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


class _Pack(ctypes.Structure):
    """struct nybble_pack."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("source_scales", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("num_row_scales", ctypes.c_int64),
    )


class _PackInt8(ctypes.Structure):
    """struct nybble_pack_int8."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("is_bfloat16", ctypes.c_int64),
    )


@dataclass(frozen=True)
class CpuMatrix:
    """A matrix of `shape` [N, K], or a stack [E, N, K], which has E = 1 below without.

    codes: uint8 [E, ceil(N / 16), ceil(K / 32), bytes of a block]
    scales: uint8 [E, ceil(N / 16), ceil(K / 32), bytes of a block]
    row_scales: float32 [E, ceil(N / 16) * 16]

    What a kind does not have is an empty tensor: FP8 has no block scales, BFLOAT16 and FLOAT32 no scales.
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


def prepare(
    weight: Tensor | QuantizedTensor,
    float_form: FloatForm = "int8",
    pool: Pool | None = None,
    memory: WeightMemory | None = None,
) -> CpuMatrix:
    """A matrix [N, K] or a stack [E, N, K]. FP4 and FP8 stay as they are; floats become `float_form`.

    pool: whose threads share the work; by default the caller's does it. memory: by default memory of its own.

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
    if isinstance(weight, QuantizedTensor):
        return _prepare_quantized(weight, pool, memory)
    if float_form == "int8":
        return _prepare_int8(weight, pool, memory)
    return _pack(_empty(Kind.BFLOAT16, shape, memory), weight.bfloat16(), None, pool)


def prepare_float32(weight: Tensor) -> CpuMatrix:
    """A float matrix [N, K] as float32, for products that must not be rounded: a router's."""
    return _pack(_empty(Kind.FLOAT32, tuple(weight.shape), None), weight.float(), None, None)


def dequantize(matrix: CpuMatrix) -> Tensor:
    """float32 of the matrix's shape: exactly what it stands for."""
    weights = torch.stack([_dequantize_one(matrix, index) for index in range(matrix.num_matrices)])
    return weights[:, : matrix.num_rows, : matrix.num_columns].reshape(matrix.shape).contiguous()


def _empty(kind: Kind, shape: tuple[int, ...], memory: WeightMemory | None) -> CpuMatrix:
    *stack, rows, columns = shape
    tiles, blocks = -(-rows // TILE_ROWS), -(-columns // BLOCK_COLUMNS)
    num_matrices = stack[0] if stack else 1
    has_row_scales = kind not in (Kind.BFLOAT16, Kind.FLOAT32)
    return CpuMatrix(
        kind,
        shape,
        codes=_area((num_matrices, tiles, blocks, _CODE_BYTES[kind]), memory),
        scales=_area((num_matrices, tiles, blocks, _SCALE_BYTES[kind]), memory),
        row_scales=torch.empty((num_matrices, tiles * TILE_ROWS if has_row_scales else 0)),
    )


def _area(shape: tuple[int, ...], memory: WeightMemory | None) -> Tensor:
    if memory is None:
        return torch.empty(shape, dtype=torch.uint8)
    return memory.area(math.prod(shape)).view(shape)


def _prepare_quantized(weight: QuantizedTensor, pool: Pool | None, memory: WeightMemory | None) -> CpuMatrix:
    kind = {FP8: Kind.FP8, MXFP4: Kind.FP4_BY_32}.get(weight.format, Kind.FP4_BY_16)
    codes, scales, is_nan = _stored(weight)
    matrix = _pack(_empty(kind, tuple(weight.shape), memory), codes, scales, pool)
    row_scales = (weight.row_factors() * _ROW_FACTORS[kind]).masked_fill(is_nan, torch.nan)
    padding = matrix.row_scales.shape[1] - matrix.num_rows
    matrix.row_scales.copy_(F.pad(row_scales.view(matrix.num_matrices, -1), (0, padding)))
    return matrix


def _stored(weight: QuantizedTensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Codes; block scales uint8 [..., N, blocks], whose signs they take; which rows have a NaN among them."""
    if weight.block_scales is None:
        return weight.codes, None, (weight.codes.view(torch.uint8) & 0x7F).amax(dim=-1) == 0x7F
    scales = weight.block_scales.view(torch.uint8)
    if weight.format is MXFP4:  # E8M0 has no signs
        return weight.codes, scales, (scales == 0xFF).any(dim=-1)
    is_nan = ((scales & 0x7F) == 0x7F).any(dim=-1)
    is_negative = scales > 0x7F
    if not is_negative.any():
        return weight.codes, scales, is_nan
    flips = (is_negative * 0x88).to(torch.uint8).repeat_interleave(8, dim=-1)  # both codes of a byte
    return weight.codes ^ flips, scales & 0x7F, is_nan


def _pack(matrix: CpuMatrix, codes: Tensor, scales: Tensor | None, pool: Pool | None) -> CpuMatrix:
    """codes [..., N, bytes or numbers] as they are, in another place; without row scales."""
    codes = codes.contiguous()
    scales = None if scales is None else scales.contiguous()
    arguments = _Pack(
        matrix.address,
        matrix.codes.data_ptr(),
        matrix.scales.data_ptr(),
        codes.data_ptr(),
        None if scales is None else scales.data_ptr(),
        codes.shape[-1] * codes.itemsize,
        0 if scales is None else scales.shape[-1],
    )
    _run("nybble_pack", arguments, pool)
    return matrix


def _prepare_int8(weight: Tensor, pool: Pool | None, memory: WeightMemory | None) -> CpuMatrix:
    matrix = _empty(Kind.INT8, tuple(weight.shape), memory)
    is_bfloat16 = weight.dtype == torch.bfloat16
    source = (weight if is_bfloat16 else weight.float()).contiguous()
    arguments = _PackInt8(
        matrix.address,
        matrix.codes.data_ptr(),
        matrix.scales.data_ptr(),
        matrix.row_scales.data_ptr(),
        source.data_ptr(),
        is_bfloat16,
    )
    _run("nybble_pack_int8", arguments, pool)
    return matrix


def _run(name: str, arguments: ctypes.Structure, pool: Pool | None) -> None:
    if pool:
        pool.run(pool.operation(name, type(arguments)), arguments)
    else:
        native_library().operation(name, type(arguments))(0, arguments)


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
    """float32 [tiles, 16, blocks, 32]: what codes stand for, times two if they are E2M1, 2^-8 if E4M3."""
    tiles, blocks, _ = codes.shape
    if kind is Kind.FP8:
        columns = codes.view(torch.float8_e4m3fn).view(tiles, blocks, BLOCK_COLUMNS, TILE_ROWS)
        return columns.permute(0, 3, 1, 2).float() / 2**8
    if kind is Kind.INT8:
        lines = codes.view(tiles, blocks, 4, 2, TILE_ROWS, 4).permute(0, 4, 1, 2, 5, 3)
        return lines.reshape(tiles, TILE_ROWS, blocks, BLOCK_COLUMNS).float() - 128
    words = codes.view(tiles, blocks, 4, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
    return 2 * unpack_codes(words.reshape(tiles, TILE_ROWS, blocks, BLOCK_COLUMNS // 2))


def _column_scales(matrix: CpuMatrix, index: int) -> Tensor:
    """float32 [tiles, 16, blocks, 32]: block scale times row scale of each weight."""
    stored = matrix.scales[index]
    tiles, blocks, _ = stored.shape
    if matrix.kind is Kind.FP8:
        scales = torch.ones((tiles, TILE_ROWS))
    elif matrix.kind is Kind.INT8:
        scales = stored.view(torch.float16).float()
    elif matrix.kind is Kind.FP4_BY_16:
        scales = stored.view(torch.float8_e4m3fn).float() / 2**8
    else:
        scales = stored.view(torch.float8_e8m0fnu).float()
    by_row = scales.view(tiles, -1, TILE_ROWS).transpose(1, 2)
    scaled = by_row * matrix.row_scales[index].view(tiles, TILE_ROWS, 1)
    size = blocks * BLOCK_COLUMNS // scaled.shape[-1]
    return scaled.repeat_interleave(size, dim=-1).view(tiles, TILE_ROWS, blocks, BLOCK_COLUMNS)
