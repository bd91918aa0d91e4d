from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from nybble.engine.checkpoint.manifest import MANIFEST_FILE, check_manifest, write_manifest
from nybble.engine.errors import CheckpointError


def _ignore(count: int) -> None:
    pass


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    write_manifest(tmp_path, tmp_path / MANIFEST_FILE, _ignore)
    return tmp_path


def _problems(directory: Path) -> list[str]:
    return list(check_manifest(directory, directory / MANIFEST_FILE, _ignore))


def test_holds_the_hash_of_every_file(directory: Path) -> None:
    recorded = json.loads((directory / MANIFEST_FILE).read_text())["sha256"]
    assert recorded == {
        "a.safetensors": hashlib.sha256(b"weights").hexdigest(),
        "config.json": hashlib.sha256(b"{}").hexdigest(),
    }
    assert _problems(directory) == []


def test_names_what_changed(directory: Path) -> None:
    (directory / "a.safetensors").write_bytes(b"Weights")
    (directory / "config.json").unlink()
    (directory / "new").touch()
    changed, gone, new = _problems(directory)
    assert changed.startswith("a.safetensors: SHA-256 is ")
    assert gone == "config.json: is in the manifest but not in the directory"
    assert new == "new: is in the directory but not in the manifest"


def test_progress_counts_every_byte(directory: Path) -> None:
    counts: list[int] = []
    list(check_manifest(directory, directory / MANIFEST_FILE, counts.append))
    assert sum(counts) == len(b"weights") + len("{}")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": []}'])
def test_a_broken_manifest_is_named(directory: Path, content: str) -> None:
    (directory / MANIFEST_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=MANIFEST_FILE):
        _problems(directory)


def test_a_manifest_that_cannot_be_written(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_manifest(directory, directory / "absent" / "manifest", _ignore)
