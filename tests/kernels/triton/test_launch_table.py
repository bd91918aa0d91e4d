"""Launch tables: written, read, applied; whatever is wrong with one is said."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nybble.kernels.triton.launch_table import (
    LaunchKey,
    LaunchTable,
    LaunchTableError,
    bucket,
    default_launch_table,
    load_launch_table,
)


@dataclass(frozen=True)
class SomeLaunch:
    block_rows: int
    num_stages: int
    is_swapped: bool = False


OPS = {"matmul": SomeLaunch}
SHAPE = {"tokens": 8, "rows": 5120}
KEY = LaunchKey.of("matmul", 90, "nvfp4", SHAPE)
DEFAULT = SomeLaunch(32, 3)


def write(path: Path, **changes: Any) -> Path:
    entry = {"op": "matmul", "arch": 90, "format": "nvfp4", "shape": SHAPE, "fields": {"num_stages": 4}}
    table = {"schema": "nybble-launches/1", "launches": [entry | changes]}
    path.write_text(json.dumps(table))
    return path


def test_a_table_replaces_fields(tmp_path: Path) -> None:
    table = load_launch_table(write(tmp_path / "table.json"), OPS)
    assert table.tuned("matmul", 90, "nvfp4", dict(reversed(SHAPE.items())), DEFAULT) == SomeLaunch(32, 4)


@pytest.mark.parametrize(
    ("op", "arch", "format", "shape"),
    [
        ("other", 90, "nvfp4", SHAPE),
        ("matmul", 80, "nvfp4", SHAPE),
        ("matmul", 90, "mxfp4", SHAPE),
        ("matmul", 90, "nvfp4", SHAPE | {"tokens": 16}),
    ],
)
def test_other_launches_keep_their_defaults(op: str, arch: int, format: str, shape: dict[str, int]) -> None:
    table = LaunchTable({KEY: {"num_stages": 4}})
    assert table.tuned(op, arch, format, shape, DEFAULT) is DEFAULT


def test_an_empty_table_changes_nothing() -> None:
    assert LaunchTable().tuned("matmul", 90, "nvfp4", SHAPE, DEFAULT) is DEFAULT


def test_there_and_back(tmp_path: Path) -> None:
    table = LaunchTable({KEY: {"num_stages": 4, "is_swapped": True}}, "H100", "3.9.0")
    path = tmp_path / "table.json"
    path.write_text(table.to_json())
    assert load_launch_table(path, OPS) == table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "matmull"}, "launch 0: op 'matmull' is not known; known are matmul"),
        (
            {"fields": {"stages": 4}},
            "matmul has no stages; its fields are block_rows, is_swapped, num_stages",
        ),
        ({"fields": {"num_stages": "4"}}, "fields is {'num_stages': '4'}, expected names with whole numbers"),
        ({"shape": [1]}, "shape is"),
        ({"more": 1}, "expected arch, fields, format, op, shape, found"),
    ],
)
def test_bad_entries(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "table.json", **changes)
    with pytest.raises(LaunchTableError) as caught:
        load_launch_table(path, OPS)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "nybble-launches/2"}'])
def test_other_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(LaunchTableError, match=str(path)):
        load_launch_table(path, OPS)
    with pytest.raises(LaunchTableError, match="No such file"):
        load_launch_table(tmp_path / "missing.json", OPS)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (16384, 16384)]
)
def test_buckets(count: int, expected: int) -> None:
    assert bucket(count) == expected


def test_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_launch_table() == tmp_path / "nybble" / "launches.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert default_launch_table() == Path.home() / ".config" / "nybble" / "launches.json"
