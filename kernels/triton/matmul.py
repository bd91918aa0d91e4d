"""Matrices as `TritonOps` holds them, and their products with activations.

Activations come in fragment order (`activation_order`), padded with zeros to the matrix's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.quantized_tensor import QuantizedTensor
from nybble.kernels.triton import activation_order
from nybble.kernels.triton.activation_quantization import quantization_launch, quantize_activations
from nybble.kernels.triton.fp4_linear import fp4_linear
from nybble.kernels.triton.fp4_matrix import Fp4Matrix, pack_fp4
from nybble.kernels.triton.fp8_linear import fp8_linear
from nybble.kernels.triton.fp8_matrix import Fp8Matrix, pack_fp8
from nybble.kernels.triton.launch_choice import LaunchChoice
from nybble.kernels.triton.native_fp4 import activation_format, native_fp4_launch, native_linear

# From so many tokens on, arithmetic takes longer than reading weights: operands of FP4 instructions pay.
NATIVE_TOKENS = 128


@dataclass(frozen=True)
class PlainMatrix:
    """[N, K'] or a stack [E, N, K']: floats with their columns in fragment order, K' is K padded to 64s."""

    weight: Tensor

    @property
    def num_rows(self) -> int:
        return self.weight.shape[-2]

    @property
    def width(self) -> int:
        return self.weight.shape[-1]


Matrix = Fp4Matrix | Fp8Matrix | PlainMatrix


def prepare_matrix(weight: Tensor | QuantizedTensor, dtype: torch.dtype, arch: int) -> Matrix:
    """A matrix [N, K] or a stack [E, N, K]. `dtype` is that of activations.

    Raises:
        ValueError: a stack in FP8, for which there is no kernel.
    """
    converts_codes = arch >= 100
    if isinstance(weight, QuantizedTensor):
        if weight.format.bits == 4:
            return pack_fp4(weight, converts_codes)
        return pack_fp8(weight, converts_codes)
    padding = activation_order.padded_width(weight.shape[-1]) - weight.shape[-1]
    return PlainMatrix(activation_order.to_fragment_order(F.pad(weight.to(dtype), (0, padding))))


def operand_dtype(matrix: Matrix, dtype: torch.dtype) -> torch.dtype:
    """What activations of `dtype` should be stored as for `matrix`: float16 where its codes become
    float16."""
    is_float16 = isinstance(matrix, Fp4Matrix | Fp8Matrix) and matrix.is_float16
    return torch.float16 if is_float16 and dtype == torch.bfloat16 else dtype


def linear(x: Tensor, matrix: Matrix, dtype: torch.dtype, choice: LaunchChoice) -> Tensor:
    """`dtype` [T, N]: the product of x [T, K'] with the matrix."""
    if isinstance(matrix, PlainMatrix):
        return choice.policy.arithmetic.linear(x.to(matrix.weight.dtype), matrix.weight).to(dtype)
    num_tokens = choice.tokens(len(x))
    if isinstance(matrix, Fp8Matrix):
        return fp8_linear(x, matrix, dtype, launch=choice.fp8_linear(num_tokens, matrix))
    format = activation_format(matrix.block_size, matrix.width, choice.arch)
    if format is None or num_tokens < NATIVE_TOKENS:
        return fp4_linear(x, matrix, dtype, launch=choice.fp4_linear(num_tokens, matrix))
    launch = quantization_launch(matrix.width, choice.arch)
    codes = quantize_activations(x, format, fragment_order=True, launch=launch)
    native = native_fp4_launch(num_tokens, matrix.block_size, choice.arch)
    return native_linear(codes, matrix, dtype, launch=native)
