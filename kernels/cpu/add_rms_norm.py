"""The sum of hidden states and an update, and its RMS norm."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.tensor_pointer import pointer
from nybble.kernels.ops import RmsNorm


class _Arguments(ctypes.Structure):
    """struct nybble_add_rms_norm."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("update", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


def add_rms_norm(pool: Pool, hidden: Tensor, update: Tensor | None, norm: RmsNorm) -> tuple[Tensor, Tensor]:
    """hidden + update, which is hidden itself without an update, and its norm. All float32 [T, N].

    Raises:
        ValueError: a shape, dtype, device or layout is not as said.
    """
    tokens, columns = hidden.shape
    normed = pool.empty(tokens, columns)
    added = hidden if update is None else pool.empty(tokens, columns)
    arguments = _Arguments(
        pointer("hidden", hidden, torch.float32, (tokens, columns)),
        None if update is None else pointer("update", update, torch.float32, (tokens, columns)),
        pointer("norm.weight", norm.weight, torch.float32, (columns,)),
        None if update is None else added.data_ptr(),
        normed.data_ptr(),
        tokens,
        columns,
        norm.eps,
    )
    pool.run(pool.operation("nybble_add_rms_norm", _Arguments), arguments)
    return added, normed
