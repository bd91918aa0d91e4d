"""safetensors files written by hand, so that they can be wrong in every way."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

Header = dict[str, Any]


def entry(dtype: str, shape: list[int], start: int, end: int) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """`length` is what the file claims of its header."""
    claimed = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", claimed) + header + data)


def write(path: Path, header: object, data: bytes = b"") -> None:
    write_raw(path, json.dumps(header).encode(), data)


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
