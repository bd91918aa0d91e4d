"""Random inputs for benchmark cases: on a device, or on "meta", where they have shapes only.

Activations are normal. Codes of weights are uniform over all their values, scales vary from block to block,
and a product of a row with normal activations is about as large as those: no zeros, no overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.kernels.quantized_tensor import FP8, MXFP4, NVFP4, QuantizedTensor
from nybble.kernels.triton import activation_order
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.fp8_matrix import Fp8Matrix
from nybble.kernels.triton.matmul import Matrix, PlainMatrix, operand_dtype, prepare_matrix

_SEED = 4
_E2M1_RMS = 2.9
_FORMATS = {"nvfp4": NVFP4, "mxfp4": MXFP4, "fp8": FP8}
_E4M3_ONE, _E8M0_ONE = 0x38, 127


@dataclass(frozen=True)
class LoadedWeight:
    """matrix: as `TritonOps` holds it; source: as a checkpoint does, None on meta."""

    matrix: Matrix
    source: QuantizedTensor | Tensor | None


class BenchInputs:
    """Makes tensors on `device` for kernels of `arch`, activations in `dtype`; the same each time."""

    def __init__(self, device: torch.device, arch: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = device
        self.arch = arch
        self.dtype = dtype
        self._generator = None if self.is_meta else torch.Generator(device).manual_seed(_SEED)

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of activations that meet quantized weights."""
        return torch.float16 if self.arch >= 100 and self.dtype == torch.bfloat16 else self.dtype

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        dtype = dtype or self.dtype
        if self.is_meta:
            return self.empty(*shape, dtype=dtype)
        return torch.randn(*shape, generator=self._generator, device=self.device, dtype=dtype).mul_(scale)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """low <= number < high."""
        if self.is_meta:
            return self.empty(*shape, dtype=dtype)
        return torch.randint(low, high, shape, generator=self._generator, device=self.device, dtype=dtype)

    def shuffled(self, count: int) -> Tensor:
        """int32 0 .. count in any order."""
        if self.is_meta:
            return self.empty(count, dtype=torch.int32)
        return torch.randperm(count, generator=self._generator, device=self.device, dtype=torch.int32)

    def activations(self, num_tokens: int, matrix: Matrix) -> Tensor:
        """[num_tokens, matrix.width] in fragment order, as `matrix` wants them; see `natural`."""
        return self.normal(num_tokens, matrix.width, dtype=operand_dtype(matrix, self.dtype))

    def load(self, format: str, *shape: int) -> LoadedWeight:
        """A matrix [N, K] or a stack [E, N, K], in one of the formats "nvfp4", "mxfp4", "fp8" and "bf16"."""
        if self.is_meta:
            return LoadedWeight(_empty_matrix(format, shape, self.dtype, self.arch), None)
        source = self._source(format, shape)
        return LoadedWeight(prepare_matrix(source, self.dtype, self.arch), source)

    def _source(self, format: str, shape: tuple[int, ...]) -> QuantizedTensor | Tensor:
        if format == "bf16":
            return self.normal(*shape, scale=shape[-1] ** -0.5)
        return self._quantized(format, shape)

    def _quantized(self, format: str, shape: tuple[int, ...]) -> QuantizedTensor:
        *rows, width = shape
        form, gain = _FORMATS[format], width**-0.5
        if format == "fp8":
            codes = self.normal(*shape, dtype=torch.float32).to(torch.float8_e4m3fn)
            return QuantizedTensor(codes, None, torch.full(rows, gain, device=self.device), form)
        assert form.block_size
        codes = self.integers(0, 256, *rows, width // 2, dtype=torch.uint8)
        blocks = (*rows, width // form.block_size)
        if format == "nvfp4":  # from 1 / 2 to 2
            scales = self.integers(_E4M3_ONE - 8, _E4M3_ONE + 9, *blocks, dtype=torch.uint8)
            globals_ = torch.full(rows, gain / _E2M1_RMS, device=self.device)
            return QuantizedTensor(codes, scales.view(torch.float8_e4m3fn), globals_, form)
        middle = _E8M0_ONE + round(torch.tensor(gain / _E2M1_RMS).log2().item())
        scales = self.integers(middle - 1, middle + 2, *blocks, dtype=torch.uint8)
        return QuantizedTensor(codes, scales.view(torch.float8_e8m0fnu), None, form)


def natural(x: Tensor, width: int) -> Tensor:
    """Columns in fragment order back in their places, without the padding."""
    return activation_order.from_fragment_order(x)[..., :width]


def dequantized(matrix: Matrix, width: int) -> Tensor:
    """float32 [.., N, width]: the weight as the kernels see it."""
    if isinstance(matrix, PlainMatrix):
        return natural(matrix.weight, width).float()
    return matrix.dequantize()


def _empty_matrix(format: str, shape: tuple[int, ...], dtype: torch.dtype, arch: int) -> Matrix:
    *lead, num_rows, width = shape
    padded = activation_order.padded_width(width)
    converts_codes = arch >= 100
    row_scales = torch.empty(*lead, num_rows, device="meta")
    if format == "bf16":
        return PlainMatrix(torch.empty(*lead, num_rows, padded, dtype=dtype, device="meta"))
    if format == "fp8":
        codes = torch.empty(num_rows, padded, dtype=torch.uint8, device="meta")
        return Fp8Matrix(codes, row_scales, converts_codes, (num_rows, width))
    block_size = _FORMATS[format].block_size
    assert block_size
    words = (*lead, -(-num_rows // 16), -(-width // 256), 1024 // block_size)
    return Fp4Matrix(
        codes=torch.empty(*lead, num_rows, padded // 2, dtype=torch.uint8, device="meta"),
        scale_words=torch.empty(*words, dtype=torch.int32, device="meta"),
        row_scales=row_scales,
        block_size=block_size,
        is_float16=converts_codes,
        shape=shape,
    )
