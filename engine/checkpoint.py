"""The safetensors files of a checkpoint directory: what they hold, read without loading it.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, data
(https://github.com/huggingface/safetensors, "Format"). `Checkpoint.open` reads only headers, so a
200 GB checkpoint is checked for completeness in a moment; `read` then loads one tensor at a time.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nybble.engine.errors import CheckpointError
from nybble.engine.model_config import read_json_object

INDEX_FILE = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies. `dtype` is safetensors' name: BF16, F32, U8, F8_E4M3, ..."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.file.name}: tensor {self.name!r}"


class Checkpoint:
    """The tensors of a checkpoint directory by name."""

    def __init__(self, directory: Path, entries: dict[str, TensorEntry]) -> None:
        self.directory = directory
        self.entries = entries
        self._open_files: dict[Path, Any] = {}  # a shard's header is long: parse it once

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
        self._open_files.clear()

    def read(self, name: str) -> Tensor:
        """Load one tensor to host memory. Raises CheckpointError if its file cannot be read."""
        entry = self.entries[name]
        try:
            if entry.file not in self._open_files:
                self._open_files[entry.file] = safe_open(entry.file, framework="pt")
            tensor: Tensor = self._open_files[entry.file].get_tensor(name)
            return tensor
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{entry}: cannot be read: {error}") from error


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
    header, data_bytes = _parse_header(path)
    header.pop("__metadata__", None)
    spans = {name: _parse_entry(path, name, fields) for name, fields in header.items()}
    _check_layout(spans, data_bytes)
    return {name: entry for name, (entry, _, _) in spans.items()}


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header and the number of data bytes that follow it."""
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
    return header, size - 8 - length


def _parse_entry(path: Path, name: str, fields: Any) -> tuple[TensorEntry, int, int]:
    """A tensor's entry, and where its data starts and ends."""
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            entry = TensorEntry(name, path, dtype, tuple(shape))
        case _:
            raise CheckpointError(f"{path.name}: tensor {name!r}: malformed header entry")
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{entry}: dtype {dtype} is not known")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(f"{entry}: shape {shape} is not one")
    if end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise CheckpointError(f"{entry}: {end - start} bytes do not hold {dtype} {shape}")
    return entry, start, end


def _check_layout(spans: dict[str, tuple[TensorEntry, int, int]], data_bytes: int) -> None:
    """The format wants each tensor to begin where the one before it ends, up to the end of the file."""
    position = 0
    for entry, start, end in sorted(spans.values(), key=lambda span: span[1:]):
        if start != position:
            raise CheckpointError(f"{entry}: its data starts at byte {start}, expected {position}")
        if end > data_bytes:
            raise CheckpointError(
                f"{entry}: truncated: its data ends at byte {end} of {data_bytes} in the file"
            )
        position = end
    if spans and position != data_bytes:
        raise CheckpointError(f"{entry.file.name}: {data_bytes - position} bytes follow the last tensor")
