"""The wheel holds the three packages under one namespace, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("engine", "kernels", "server")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build directory appears in the source tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*LAYERS, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(target), str(source)], check=True)
    (path,) = target.glob("*.whl")
    return path


def test_wheel_holds_every_module_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = [path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).glob("**/*.py")]
    assert packed == {f"nybble/{path}" for path in modules}


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
