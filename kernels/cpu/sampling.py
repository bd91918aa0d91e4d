"""Picking a token from each row of logits."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.tensor_pointer import pointer
from nybble.kernels.ops import SamplingBatch


class _Arguments(ctypes.Structure):
    """struct nybble_sample."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("bits", ctypes.c_void_p),
        ("picks", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
    )


def sample_unfiltered(
    pool: Pool, logits: Tensor, temperatures: Tensor, draws: Tensor, num_token_ids: int
) -> Tensor:
    """int64 [S]: as `Ops.sample` of logits, float32 [S, V], without min_p, top_k and top_p.

    temperatures: float32 [S]; draws: int64 [S].

    Raises:
        ValueError: an argument has another shape or dtype than it should.
    """
    rows, num_columns = logits.shape
    if not 1 <= num_token_ids <= num_columns:
        raise ValueError(f"num_token_ids is {num_token_ids}, expected 1 to {num_columns} columns of logits")
    picks = torch.empty(rows, dtype=torch.int64)
    arguments = _Arguments(
        pointer("logits", logits, torch.float32, (rows, num_columns)),
        pointer("temperatures", temperatures, torch.float32, (rows,)),
        pointer("draws", draws, torch.int64, (rows,)),
        picks.data_ptr(),
        num_columns,
        rows,
        num_token_ids,
    )
    pool.run(pool.operation("nybble_sample", _Arguments), arguments)
    return picks


def is_unfiltered(batch: SamplingBatch) -> Tensor:
    """bool [S]: rows from which min_p, top_k and top_p drop nothing."""
    return (batch.min_ps == 0) & (batch.top_ks == 0) & (batch.top_ps >= 1)
