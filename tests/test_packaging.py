"""The wheel holds the three packages under one namespace and the native library, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("engine", "kernels", "server")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that no build directory appears in the source tree, without what was built there."""
    copied = tmp_path_factory.mktemp("source")
    for name in (*LAYERS, "scripts", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("_native.so"))
        else:
            shutil.copy(ROOT / name, copied / name)
    return copied


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(target), str(source)], check=True)
    (path,) = target.glob("*.whl")
    return path


def test_wheel_holds_every_module_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {*modules(), "nybble/kernels/cpu/_native.so"}
    assert wheel.name.startswith("nybble-0.1.0-py3-none-") and not wheel.name.endswith("-any.whl")


def modules() -> set[str]:
    paths = [path for layer in LAYERS for path in (ROOT / layer).glob("**/*.py")]
    return {f"nybble/{path.relative_to(ROOT)}" for path in paths}


def run_hook(source: Path, name: str, target: Path, **environment: str) -> Path:
    """What pip would call, without the environment that it makes for it."""
    code = f"import build_backend; print('made', build_backend.{name}({str(target)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source / "scripts"), **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return target / result.stdout.splitlines()[-1].removeprefix("made ")


def test_source_distribution_holds_what_the_library_is_built_from(source: Path, tmp_path: Path) -> None:
    with tarfile.open(run_hook(source, "build_sdist", tmp_path)) as archive:
        packed = {name.split("/", 1)[-1] for name in archive.getnames()}
    native = (ROOT / "kernels" / "cpu" / "native").iterdir()
    assert {f"kernels/cpu/native/{path.name}" for path in native} <= packed
    assert {"setup.py", "scripts/native_build.py", "scripts/build_backend.py"} <= packed


def test_without_a_working_compiler_the_rest_is_installed(source: Path, tmp_path: Path) -> None:
    wheel = run_hook(source, "build_wheel", tmp_path, CC="false")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path)
    assert packed == modules()
    code = "import nybble.kernels.cpu.native_library as n; n.native_library()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert "NativeLibraryError: the native CPU backend was not built" in result.stderr


def test_namespace_does_not_shadow_other_packages(wheel: Path, tmp_path: Path) -> None:
    """transformers imports Hugging Face's `kernels` if there is one: ours must not answer to that name."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import importlib.util as u; print([n for n in ('kernels','engine','server') if u.find_spec(n)])"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"nybble", "nybble-0.1.0.dist-info"}


def test_installed_from_the_wheel_it_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import nybble.server.commands.cli as c; print(c.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout.strip() == str(tmp_path / "nybble" / "server" / "commands" / "cli.py")


def test_no_package_marker_in_the_source_folders() -> None:
    assert [path for layer in LAYERS for path in (ROOT / layer).glob("**/__init__.py")] == []


def test_constraints_pin_torch_and_not_triton() -> None:
    names = {
        line.split("==")[0].strip().lower() for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert "torch" in names
    assert "triton" not in names


def test_every_direct_dependency_is_constrained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = {name.split(">=")[0] for group in (project["dependencies"], *extras) for name in group}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert declared - {"triton"} <= pinned
