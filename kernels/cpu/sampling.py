"""Picking a token from each row of logits."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.tensor_pointer import pointer
from nybble.kernels.ops import SamplingBatch

_MAX_COLUMNS = 1 << 22  # whose weights, of 2^40 at most, have a sum that 64 bits hold


class _Arguments(ctypes.Structure):
    """struct nybble_sample."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("top_ks", ctypes.c_void_p),
        ("top_ps", ctypes.c_void_p),
        ("min_ps", ctypes.c_void_p),
        ("bits", ctypes.c_void_p),
        ("picks", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
    )


def sample(pool: Pool, logits: Tensor, batch: SamplingBatch, num_token_ids: int) -> Tensor:
    """int64 [S]: as `Ops.sample` of logits, float32 [S, V].

    A pick depends on nothing but its row: not on the level, the threads or the other rows. It may differ from
    the reference's, which rounds otherwise, where the scores of two tokens are within 1e-14 of each other or
    a token is within 1e-7 of the border of min_p or top_p. A row whose largest logit is infinite or NaN is
    picked greedily, NaN being the largest.

    Raises:
        ValueError: an argument has another shape or dtype than it should.
    """
    rows, num_columns = logits.shape
    if not 1 <= num_token_ids <= num_columns:
        raise ValueError(f"num_token_ids is {num_token_ids}, expected 1 to {num_columns} columns of logits")
    if num_token_ids > _MAX_COLUMNS:
        raise ValueError(f"num_token_ids is {num_token_ids}, expected at most {_MAX_COLUMNS}")
    picks = pool.empty(rows, dtype=torch.int64)
    arguments = _Arguments(
        pointer("logits", logits, torch.float32, (rows, num_columns)),
        pointer("temperatures", batch.temperatures, torch.float32, (rows,)),
        pointer("top_ks", batch.top_ks, torch.int64, (rows,)),
        pointer("top_ps", batch.top_ps, torch.float32, (rows,)),
        pointer("min_ps", batch.min_ps, torch.float32, (rows,)),
        pointer("draws", batch.draws, torch.int64, (rows,)),
        picks.data_ptr(),
        num_columns,
        rows,
        num_token_ids,
    )
    pool.run(pool.operation("nybble_sample", _Arguments), arguments)
    return picks
