"""x times the transpose of a matrix, on the native library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nybble.kernels.cpu.cpu_matrix import CpuMatrix
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.tensor_pointer import pointer


class _Arguments(ctypes.Structure):
    """struct nybble_linear."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
    )


def linear(pool: Pool, x: Tensor, matrix: CpuMatrix) -> Tensor:
    """float32 [T, N]: x, float32 [T, K], times the transpose of a matrix [N, K].

    A row of the result depends on nothing but its row of x and the matrix. Where a row of x has a number that
    is not finite, its result is NaN or infinite.

    Raises:
        ValueError: x is not as said, or the matrix is a stack.
    """
    if len(matrix.shape) != 2:
        raise ValueError(f"linear takes a matrix [N, K], not {list(matrix.shape)}")
    num_tokens = x.shape[0]
    y = pool.empty(num_tokens, matrix.num_rows)
    address = pointer("x", x, torch.float32, (num_tokens, matrix.num_columns))
    arguments = _Arguments(matrix.address, address, y.data_ptr(), num_tokens)
    pool.run(pool.operation("nybble_linear", _Arguments), arguments)
    return y
