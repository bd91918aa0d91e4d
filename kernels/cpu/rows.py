"""Rows of tables: of embeddings and rotary angles."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nybble.kernels.cpu.index_range import index_range
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.tensor_pointer import pointer
from nybble.kernels.ops import Embedding, RotaryAngles


class _Arguments(ctypes.Structure):
    """struct nybble_rows."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("num_ids", ctypes.c_int64),
        ("first_id", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


def embed(pool: Pool, token_ids: Tensor, embedding: Embedding) -> Tensor:
    """float32 [T, H]: see `Ops.embed`; token_ids int64 [T], the table float32.

    Raises:
        ValueError: a shape, dtype, device or layout is not as said.
    """
    return _rows(pool, "token_ids", token_ids, embedding.table, embedding.first_id)


def rotary_angles(pool: Pool, table: RotaryAngles, positions: Tensor) -> RotaryAngles:
    """float32 [T, rotary_dim / 2] each: see `Ops.rotary_angles`; positions int64 [T], the table float32.

    Raises:
        ValueError: a shape, dtype, device or layout is not as said, or the table has no such position.
    """
    num_positions = len(table.cos)
    _check_positions(positions, num_positions)
    pool.before_replay(
        ("positions", id(positions), num_positions), lambda: _check_positions(positions, num_positions)
    )
    cos, sin = (_rows(pool, "positions", positions, rows, 0) for rows in (table.cos, table.sin))
    return RotaryAngles(cos=cos, sin=sin)


def _rows(pool: Pool, name: str, ids: Tensor, table: Tensor, first_id: int) -> Tensor:
    num_rows, columns = table.shape
    num_ids = len(ids)
    out = pool.empty(num_ids, columns)
    arguments = _Arguments(
        pointer("the table", table, torch.float32, (num_rows, columns)),
        pointer(name, ids, torch.int64, (num_ids,)),
        out.data_ptr(),
        num_ids,
        first_id,
        num_rows,
        columns,
    )
    pool.run(pool.operation("nybble_rows", _Arguments), arguments)
    return out


def _check_positions(positions: Tensor, num_positions: int) -> None:
    lowest, highest = index_range(positions)
    if lowest < 0 or highest >= num_positions:
        raise ValueError(f"positions are {lowest} to {highest}, but the table has {num_positions} positions")
