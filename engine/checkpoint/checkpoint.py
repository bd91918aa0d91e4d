"""The safetensors files of a checkpoint directory: what they hold, read without loading it.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, data
(https://github.com/huggingface/safetensors, "Format"). `Checkpoint.open` reads only headers, so a
200 GB checkpoint is checked for completeness in a moment; `read` then loads one tensor at a time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.engine.checkpoint.model_config import read_json_object
from nybble.engine.checkpoint.shard_reader import Extent, ShardReader
from nybble.engine.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_COMPARED_BYTES = 1 << 26  # of each of two tensors, at a time
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `offset` bytes into its file. `dtype` is safetensors' name: BF16, F32, U8, ..."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.file.name}: tensor {self.name!r}"


@dataclass(frozen=True)
class Span:
    """Indices start .. stop of a tensor's dimension `axis`, 0 or 1."""

    axis: int
    start: int
    stop: int


class Checkpoint:
    """The tensors of a checkpoint directory by name."""

    def __init__(self, directory: Path, entries: dict[str, TensorEntry]) -> None:
        self.directory = directory
        self.entries = entries
        self._reader = ShardReader()

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read the index and every file's header.

        Raises:
            CheckpointError: the directory or a file is missing, a file is truncated or malformed,
                or the index and the files disagree.
        """
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such checkpoint directory")
        entries: dict[str, TensorEntry] = {}
        index = _read_index(directory)
        for file in sorted(set(index.values())):
            for name, entry in read_header(directory / file).items():
                if name in entries:
                    raise CheckpointError(f"{entry}: stands in {entries[name].file.name} too")
                entries[name] = entry
        _check_index(index, entries)
        return cls(directory, entries)

    def close(self) -> None:
        """Let go of the files; reading again opens them again."""
        self._reader.close()

    def read(self, name: str, span: Span | None = None) -> Tensor:
        """Load one tensor, or a span of it, to host memory.

        Raises:
            CheckpointError: its file cannot be read.
        """
        out = self.empty(name, span)
        self.read_into([(name, span, out)])
        return out

    def empty(self, name: str, span: Span | None = None) -> Tensor:
        """Room for a tensor, or a span of it."""
        entry = self.entries[name]
        return torch.empty(_shape(entry, span), dtype=entry.torch_dtype)

    def is_copy(self, name: str, other: str, span: Span | None = None) -> bool:
        """Whether tensors `name` and `other`, [rows, columns], or spans of their rows, hold the same bytes.

        Reads both, some rows at a time. Raises CheckpointError if a file cannot be read.
        """
        entry, original = self.entries[name], self.entries[other]
        if (entry.dtype, entry.shape) != (original.dtype, original.shape):
            return False
        rows = Span(0, 0, entry.shape[0]) if span is None else span
        step = max(1, _COMPARED_BYTES * entry.shape[0] // max(entry.num_bytes, 1))
        pieces = (Span(0, at, min(at + step, rows.stop)) for at in range(rows.start, rows.stop, step))
        return all(
            torch.equal(self.read(name, piece).view(torch.uint8), self.read(other, piece).view(torch.uint8))
            for piece in pieces
        )

    def read_into(self, wanted: Iterable[tuple[str, Span | None, Tensor]]) -> None:
        """Load tensors, or spans of them, to where they are wanted: contiguous, of their shape and dtype.

        Raises:
            CheckpointError: a file cannot be read.
        """
        self._reader.read((_extent(self.entries[name], span), out) for name, span, out in wanted)


def _shape(entry: TensorEntry, span: Span | None) -> tuple[int, ...]:
    shape = list(entry.shape)
    if span is not None:
        shape[span.axis] = span.stop - span.start
    return tuple(shape)


def _extent(entry: TensorEntry, span: Span | None) -> Extent:
    """Where the bytes of a span lie: rows are contiguous, columns a part of every row."""
    num_rows = entry.shape[0] if entry.shape else 1
    stride = entry.num_bytes // num_rows if num_rows else 0
    whole = Extent(entry.name, entry.file, entry.offset, num_rows, stride, stride)
    if span is None:
        return whole
    if not 0 <= span.start <= span.stop <= entry.shape[span.axis]:
        raise ValueError(f"{entry}: {span} does not lie within {list(entry.shape)}")
    if span.axis == 0:
        return whole.rows(span.start, span.stop)
    item = entry.torch_dtype.itemsize
    return replace(whole, offset=entry.offset + span.start * item, row_bytes=(span.stop - span.start) * item)


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name; for a single file without an index, just {"": file}."""
    if (directory / INDEX_FILE).exists():
        weight_map = read_json_object(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{directory / INDEX_FILE}: has no 'weight_map'")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file or Path(file).name != file:
                raise CheckpointError(f"{INDEX_FILE}: tensor {name!r} lies in {file!r}, not a file name")
        return weight_map
    if (directory / _SINGLE).exists():
        return {"": _SINGLE}
    raise CheckpointError(f"{directory}: has neither {INDEX_FILE} nor {_SINGLE}")


def _check_index(index: dict[str, str], entries: dict[str, TensorEntry]) -> None:
    for name, file in index.items():
        if name and (name not in entries or entries[name].file.name != file):
            raise CheckpointError(f"{file}: tensor {name!r}, named by {INDEX_FILE}, is not in it")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. Raises CheckpointError if it is truncated or malformed."""
    header, data_start, file_bytes = _parse_header(path)
    header.pop("__metadata__", None)
    entries = {name: _parse_entry(path, name, fields, data_start) for name, fields in header.items()}
    _check_layout(entries.values(), data_start, file_bytes)
    return entries


def _parse_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, where the data after it begins, and where the file ends."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path.name}: truncated or not a safetensors file")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: file is missing from {path.parent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not a readable safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: its header is not a JSON object")
    return header, 8 + length, size


def _parse_entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            entry = TensorEntry(name, path, dtype, tuple(shape), data_start + start)
        case _:
            raise CheckpointError(f"{path.name}: tensor {name!r}: malformed header entry")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{entry}: dtype {dtype} is not known")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(f"{entry}: shape {shape} is not one")
    if end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise CheckpointError(f"{entry}: {end - start} bytes do not hold {dtype} {shape}")
    return entry


def _check_layout(entries: Iterable[TensorEntry], data_start: int, file_bytes: int) -> None:
    """The format wants each tensor to begin where the one before it ends, up to the end of the file."""
    position, last = data_start, None
    for last in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
        if last.offset != position:
            start, expected = last.offset - data_start, position - data_start
            raise CheckpointError(f"{last}: its data starts at byte {start}, expected {expected}")
        position = last.offset + last.num_bytes
        if position > file_bytes:
            raise CheckpointError(
                f"{last}: truncated: its data ends at byte {position - data_start} of "
                f"{file_bytes - data_start} in the file"
            )
    if last is not None and position != file_bytes:
        raise CheckpointError(f"{last.file.name}: {file_bytes - position} bytes follow the last tensor")
