"""Which compiler builds the native library, what it is given, and what is done where there is none."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import build_backend
import native_build
import pytest
from native_build import Compiler, NativeBuildError


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_cc_is_preferred_and_may_have_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "env -u X")
    assert native_build.find_compiler() == Compiler(("env", "-u", "X"))


def test_without_one_the_build_asks_for_zig(no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for hook in (build_backend.get_requires_for_build_wheel, build_backend.get_requires_for_build_editable):
        assert [name for name in hook() if name.startswith("ziglang==")]
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not [name for name in build_backend.get_requires_for_build_wheel() if "zig" in name]


def test_with_one_it_asks_for_none() -> None:
    assert not [name for name in build_backend.get_requires_for_build_wheel() if "zig" in name]


def test_without_any_compiler_the_error_names_them(no_compiler: None, tmp_path: Path) -> None:
    with pytest.raises(NativeBuildError, match=r"no C compiler .cc, gcc, clang or PyPI's ziglang"):
        native_build.build(tmp_path / "_native.so", tmp_path / "objects")


def test_zig_is_told_to_compile_for_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(native_build.sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    compiler = native_build.zig_compiler()
    assert compiler and compiler.command[1:] == ("-m", "ziglang", "cc")
    assert "-mcpu=x86_64" in compiler.options


def test_other_architectures_compile_the_portable_level_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    names = {path.stem for path in native_build.compiled_files()}
    assert native_build.compiled_files("x86_64") == native_build.compiled_files("AMD64")
    assert len(native_build.compiled_files("x86_64")) > len(names)
    assert "level_portable" in names and "thread_pool" in names
    assert not [name for name in names if native_build.level_flags(name)]


def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(NativeBuildError, match=r"failed:\n.*error"):
        native_build.build(tmp_path / "_native.so", tmp_path / "objects", ["-Dnybble_has_level=+"])
    assert not (tmp_path / "_native.so").exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_only_files_of_a_level_have_its_instructions(tmp_path: Path) -> None:
    """What runs on any machine must not have been compiled for this one."""
    native_build.build(tmp_path / "_native.so", tmp_path / "objects")
    for path in (tmp_path / "objects").glob("*.o"):
        command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stem = path.stem.rpartition("-")[0]
        has_wide = {register: f"%{register}" in code for register in ("ymm", "zmm")}
        if not native_build.level_flags(stem):
            assert not any(has_wide.values()), path
        elif not stem.startswith("level_"):
            assert has_wide["zmm"] == stem.endswith("_avx512vnni"), path


def test_what_has_not_changed_is_not_compiled_again(tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    native_build.build(tmp_path / "_native.so", objects)
    before = {path: path.stat().st_mtime_ns for path in objects.iterdir()}
    native_build.build(tmp_path / "_native.so", objects)
    assert {path: path.stat().st_mtime_ns for path in objects.iterdir()} == before
    native_build.build(tmp_path / "_native.so", objects, ["-O1"])
    assert not before.keys() & set(objects.iterdir())
