from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from nybble.server.access.api_keys import KeyFileError, make_key
from nybble.server.access.key_file import KeyFile


@pytest.fixture
def path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    caplog.set_level(logging.INFO)
    path = tmp_path / "keys.toml"
    make_key(path, "ann", {})
    return path


def looks(file: KeyFile, count: int = 4) -> list[list[str] | None]:
    return [[key.name for key in keys] if (keys := file.look()) is not None else None for _ in range(count)]


def test_a_change_counts_once_and_when_it_has_settled(path: Path) -> None:
    file = KeyFile(path)
    assert [key.name for key in file.keys] == ["ann"]
    assert looks(file) == [None] * 4
    make_key(path, "bob", {})
    assert looks(file) == [None, ["ann", "bob"], None, None]
    path.write_text("")  # half written, as some editors do
    assert file.look() is None
    make_key(path, "carl", {})
    assert looks(file) == [None, ["carl"], None, None]
    path.write_text("")
    assert looks(file) == [None, [], None, None]


def test_a_file_of_the_same_size_and_time_is_read(path: Path) -> None:
    file, stat = KeyFile(path), path.stat()
    path.write_text(path.read_text().replace('"ann"', '"bob"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert looks(file, 2) == [None, ["bob"]]


def test_a_broken_file_changes_nothing_and_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, good = KeyFile(path), path.read_text()
    path.write_text(good + "[[keys]]\nname = 5\n")
    assert looks(file) == [None] * 4
    assert caplog.text.count("the API keys stay as they were") == 1
    assert "keys.toml: Expected `str`, got `int` - at `$.keys[1].name`" in caplog.text
    path.write_text(good)
    assert looks(file) == [None, ["ann"], None, None]


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"[[keys]]\nx = 1", b'keys = "all"'])
def test_whatever_it_holds(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file = KeyFile(path)
    path.write_bytes(content)
    assert looks(file) == [None] * 4
    assert caplog.text.count("the API keys stay as they were") == 1
    with pytest.raises(KeyFileError, match=r"keys\.toml"):
        KeyFile(path)


def test_a_file_that_is_gone_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, good = KeyFile(path), path.read_text()
    path.unlink()
    assert looks(file) == [None] * 4
    assert caplog.text.count("stay as they were") == 1 and "No such file" in caplog.text
    path.write_text(good)
    assert looks(file, 2) == [None, ["ann"]]
    with pytest.raises(KeyFileError, match="No such file"):
        KeyFile(path.with_name("other.toml"))
