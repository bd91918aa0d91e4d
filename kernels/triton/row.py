"""A row of activations in the registers of one program: a tuple of tensors [CHUNK], zero past its width.

One tensor would have a power of two columns: of 8192, a row of 5120 leaves three in eight idle; as five
chunks of 1024 it leaves none. A row is loaded whole before anything is stored, so that all of its loads are
under way together.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from nybble.kernels.triton.stored_order import stored_at

_MAX_CHUNKS = 8
_LARGEST_CHUNK = 2048
_PER_THREAD = 8  # columns of a chunk: of two bytes, 16 bytes in one load


@dataclass(frozen=True)
class RowLaunch:
    """`num_chunks` of `chunk` columns, a power of two and at least 64, cover a row."""

    chunk: int
    num_chunks: int
    num_warps: int


def row_launch(width: int, arch: int) -> RowLaunch:
    """For rows of `width`, the same on every architecture: chunks that divide the row, unless those are too
    many."""
    chunk = min(max(width & -width, 64), _LARGEST_CHUNK)
    while chunk * _MAX_CHUNKS < width:
        chunk *= 2
    return RowLaunch(chunk, triton.cdiv(width, chunk), num_warps=min(max(chunk // (32 * _PER_THREAD), 1), 16))


@triton.jit
def load_row(row_ptr, width, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr):
    """The columns 0 .. width from row_ptr on."""
    parts = tl.tuple(())
    for i in tl.static_range(NUM_CHUNKS):
        columns = i * CHUNK + tl.arange(0, CHUNK)
        parts += (tl.load(row_ptr + columns, mask=columns < width, other=0.0),)
    return parts


@triton.jit
def load_fragment_row(row_ptr, width, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr):
    """As `load_row`, in natural order of a row in fragment order.

    Loads are of pairs of columns, four to a thread, which then has a run of eight: what else permutes them is
    shared memory, or shuffles in every later step.
    """
    pair = tl.arange(0, 4)[:, None, None]
    run = tl.arange(0, CHUNK // 8)[None, :, None]
    parts = tl.tuple(())
    for i in tl.static_range(NUM_CHUNKS):
        columns = i * CHUNK + run * 8 + pair * 2 + tl.arange(0, 2)[None, None, :]
        places = tl.max_contiguous(tl.multiple_of(stored_at(columns, True), (1, 1, 2)), (1, 1, 2))
        x = tl.load(row_ptr + places, mask=columns < width, other=0.0)
        parts += (tl.reshape(tl.permute(x, (1, 0, 2)), (CHUNK,)),)
    return parts


@triton.jit
def store_row(parts, row_ptr, width, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr):
    """The first `width` columns to row_ptr on."""
    for i in tl.static_range(NUM_CHUNKS):
        columns = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(row_ptr + columns, parts[i], mask=columns < width)


@triton.jit
def widened(parts, NUM_CHUNKS: tl.constexpr):
    """The row in float32."""
    wide = tl.tuple(())
    for i in tl.static_range(NUM_CHUNKS):
        wide += (parts[i].to(tl.float32),)
    return wide


@triton.jit
def in_fragment_order(x):
    """x, of any shape with a multiple of 64 columns, with its columns where `stored_at` says.

    Stores then stay contiguous: shared memory permutes, for two instructions each eight columns.
    """
    runs = tl.reshape(x, (x.numel // 64, 4, 8, 2))
    return tl.reshape(tl.permute(runs, (0, 2, 1, 3)), x.shape)
