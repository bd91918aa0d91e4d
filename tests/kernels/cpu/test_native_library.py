"""The library that is installed, what it says of this machine, and what it says when it cannot be used."""

from __future__ import annotations

import ctypes.util
import platform
import shutil
from pathlib import Path

import native_build
import pytest

from nybble.kernels.cpu.native_library import (
    LIBRARY,
    SOURCES,
    NativeLibrary,
    NativeLibraryError,
    digest_of,
    load_library,
    native_library,
)

# As Linux names them in /proc/cpuinfo, where it leaves out what it does not enable.
NEEDED = {
    "portable": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512vnni": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
def test_levels_are_those_that_the_kernel_reports() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    assert native_library().levels == tuple(name for name, needed in NEEDED.items() if needed <= flags)


def test_loaded_once() -> None:
    assert native_library() is native_library()


def test_builder_and_loader_agree_on_the_sources() -> None:
    assert native_library().sources_digest() == digest_of(SOURCES) == native_build.sources_digest()


def test_no_library(tmp_path: Path) -> None:
    with pytest.raises(NativeLibraryError, match=r"not built .*: install a C compiler"):
        load_library(tmp_path / "_native.so", tmp_path / "native")
    with pytest.raises(NativeLibraryError, match=r"not built .*: python scripts/native_build\.py"):
        load_library(tmp_path / "_native.so", SOURCES)


@pytest.mark.parametrize("change", ["edit", "new", "rename"])
def test_library_older_than_its_sources(tmp_path: Path, change: str) -> None:
    sources = tmp_path / "native"
    shutil.copytree(SOURCES, sources)
    assert load_library(LIBRARY, sources).levels
    if change == "edit":
        (sources / "rms_norm.c").write_text("int x;")
    elif change == "new":
        (sources / "new.inc").write_text("")
    else:
        (sources / "rms_norm.c").rename(sources / "norm.c")
    with pytest.raises(
        NativeLibraryError, match=r"older than its C sources: python scripts/native_build\.py"
    ):
        load_library(LIBRARY, sources)


def test_installed_library_needs_no_sources(tmp_path: Path) -> None:
    assert load_library(LIBRARY, tmp_path / "native").levels == native_library().levels


def test_what_is_no_such_library(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.so"
    garbage.write_bytes(b"\x7fELF garbage")
    name = ctypes.util.find_library("m")
    assert name
    for path in (garbage, Path(name)):
        with pytest.raises(NativeLibraryError, match=f"{path} is not the native CPU backend"):
            NativeLibrary(path)
