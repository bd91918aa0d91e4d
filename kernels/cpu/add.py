"""Hidden states and an update."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.tensor_pointer import pointer


class _Arguments(ctypes.Structure):
    """struct nybble_add."""

    _fields_ = (("sum", ctypes.c_void_p), ("update", ctypes.c_void_p), ("count", ctypes.c_int64))


def add(pool: Pool, hidden: Tensor, update: Tensor) -> Tensor:
    """hidden + update, both float32 and of one shape, in the place of hidden.

    Raises:
        ValueError: a shape, dtype, device or layout is not as said.
    """
    shape = tuple(hidden.shape)
    arguments = _Arguments(
        pointer("hidden", hidden, torch.float32, shape),
        pointer("update", update, torch.float32, shape),
        hidden.numel(),
    )
    pool.run(pool.operation("nybble_add", _Arguments), arguments)
    return hidden
