"""Reads tensors from safetensors files straight to where they are wanted, several pieces at once.

The safetensors library maps files into memory: then weights are read only when they are first used, or
copied once more. Here the disk is kept busy by threads, each of which tells the kernel what it is about to
read, and nothing is copied twice.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nybble.engine.errors import CheckpointError

_NUM_THREADS = 12
_PIECE_BYTES = 32 << 20
_SMALL_BYTES = 64 << 10  # below this, handing a piece to a thread takes longer than reading it
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Extent:
    """Bytes of a file: `num_rows` times `row_bytes`, `stride` apart, the first at `offset`.

    `name` is the tensor's, for errors.
    """

    name: str
    file: Path
    offset: int
    num_rows: int
    row_bytes: int
    stride: int

    @property
    def end(self) -> int:
        return self.offset + (self.num_rows - 1) * self.stride + self.row_bytes

    def rows(self, start: int, stop: int) -> Extent:
        offset = self.offset + start * self.stride
        return Extent(self.name, self.file, offset, stop - start, self.row_bytes, self.stride)


_Piece = tuple[Extent, Tensor]  # uint8 [num_rows, row_bytes]


class ShardReader:
    """Keeps the files open that it has read from, until `close` or its own end."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(_NUM_THREADS, "shard-reader")
        weakref.finalize(self, _release, self._descriptors, self._pool)

    def close(self) -> None:
        """Let go of the files; reading again opens them again."""
        _close_all(self._descriptors)

    def read(self, wanted: Iterable[tuple[Extent, Tensor]]) -> None:
        """Fill each tensor, contiguous and on the host, with the bytes of its extent.

        Raises:
            CheckpointError: a file cannot be read or ends too early.
        """
        large: deque[_Piece] = deque()
        small: deque[_Piece] = deque()
        for extent, out in wanted:
            self._open(extent)
            for piece in _pieces(extent, out):
                (large if piece[1].numel() >= _SMALL_BYTES else small).append(piece)
        helpers = [self._pool.submit(self._read_pieces, large) for _ in range(min(len(large), _NUM_THREADS))]
        try:
            for helper in helpers:
                helper.result()
        finally:
            large.clear()  # after an error, what is left is not wanted
            wait(helpers)
        self._read_pieces(small)  # most lie beside what has been read, and are in the page cache now

    def _open(self, extent: Extent) -> None:
        if extent.file not in self._descriptors:
            try:
                self._descriptors[extent.file] = os.open(extent.file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise _unreadable(extent, error) from error

    def _read_pieces(self, pieces: deque[_Piece]) -> None:
        """Until none is left; others may take some meanwhile."""
        while pieces:
            try:
                extent, out = pieces.popleft()
            except IndexError:
                return
            self._read_piece(extent, out)

    def _read_piece(self, extent: Extent, out: Tensor) -> None:
        descriptor = self._descriptors[extent.file]
        gap = extent.stride - extent.row_bytes
        try:
            if gap >= _PAGE_BYTES:
                for number, row in enumerate(out):
                    _read_fully(descriptor, row, extent.rows(number, number + 1))
                return
            # Closer together than pages of the disk: what lies between has to be read anyway.
            num_bytes = extent.end - extent.offset
            if num_bytes >= _SMALL_BYTES:
                os.posix_fadvise(descriptor, extent.offset, num_bytes, os.POSIX_FADV_WILLNEED)
            if not gap:
                _read_fully(descriptor, out.flatten(), extent)
                return
            through = torch.empty(extent.num_rows * extent.stride, dtype=torch.uint8)
            _read_fully(descriptor, through[:num_bytes], extent)
            out.copy_(through.view(extent.num_rows, extent.stride)[:, : extent.row_bytes])
        except OSError as error:
            raise _unreadable(extent, error) from error


def _pieces(extent: Extent, out: Tensor) -> Iterator[_Piece]:
    """Runs of rows of about `_PIECE_BYTES`; a single long row counts as many short ones."""
    if extent.row_bytes == extent.stride:
        num_bytes = extent.num_rows * extent.row_bytes
        extent = Extent(extent.name, extent.file, extent.offset, num_bytes, 1, 1)
    flat = out.reshape(-1).view(torch.uint8)
    step = max(1, _PIECE_BYTES // extent.stride)
    for start in range(0, extent.num_rows, step):
        stop = min(start + step, extent.num_rows)
        part = flat[start * extent.row_bytes : stop * extent.row_bytes]
        yield extent.rows(start, stop), part.view(stop - start, extent.row_bytes)


def _read_fully(descriptor: int, out: Tensor, extent: Extent) -> None:
    """Fill out, uint8 [N], from the extent's offset on."""
    left, position = out.numpy().data, extent.offset
    while left:
        count = os.preadv(descriptor, [left], position)
        if not count:
            raise CheckpointError(f"{extent.file.name}: tensor {extent.name!r}: the file ends within it")
        left, position = left[count:], position + count


def _unreadable(extent: Extent, error: OSError) -> CheckpointError:
    return CheckpointError(f"{extent.file.name}: tensor {extent.name!r}: cannot be read: {error}")


def _release(descriptors: dict[Path, int], pool: ThreadPoolExecutor) -> None:
    pool.shutdown(wait=False)
    _close_all(descriptors)


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
