from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny_glm import make_checkpoint

from nybble.engine.checkpoint.manifest import MANIFEST_FILE
from nybble.engine.errors import CheckpointError
from nybble.server.commands.verify import verify


def _verify(directory: Path, manifest: Path | None = None) -> str:
    console = Console(file=io.StringIO(), width=200)
    try:
        verify(directory, manifest, console)
    finally:
        assert isinstance(console.file, io.StringIO)
        output = console.file.getvalue()
        print(output)
    return output


def test_the_manifest_is_written_once_and_checked_after(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    assert "no manifest yet, written to" in _verify(tmp_path)
    written = (tmp_path / MANIFEST_FILE).read_bytes()
    output = _verify(tmp_path)
    assert "all files are those of" in output
    assert [line.split(":")[0] for line in output.splitlines()] == [
        "structure",
        "hashes",
        "numbers",
        "self-test",
    ]
    assert (tmp_path / MANIFEST_FILE).read_bytes() == written


def test_a_changed_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "glm")
    _verify(tmp_path / "glm", tmp_path / "manifest")
    with (tmp_path / "glm" / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match=r"hashes: 1 problems, the first: config.json"):
        _verify(tmp_path / "glm", tmp_path / "manifest")
    assert "config.json: SHA-256 is" in capsys.readouterr().out
    assert not (tmp_path / "glm" / MANIFEST_FILE).exists()
