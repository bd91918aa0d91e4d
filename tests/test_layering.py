"""Imports go one way: server -> engine -> kernels; and each heavy library has its place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {"server": {"server", "engine"}, "engine": {"engine", "kernels"}, "kernels": {"kernels"}}
KERNEL_LIBRARIES = {"nybble", "numpy", "torch", "triton"}
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).glob("**/*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("nybble.")}
    assert used <= LAYERS[layer]


def users_of(library: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in SOURCES if library in libraries(path)}


def test_transformers_is_used_in_one_file() -> None:
    assert users_of("transformers") == {"engine/tokenizer.py"}


def test_triton_is_used_in_its_kernels_and_their_compilation_only() -> None:
    assert all(name.startswith(("kernels/triton/", "kernels/compiled/")) for name in users_of("triton"))


def test_http_libraries_are_used_in_the_server_only() -> None:
    users = users_of("starlette") | users_of("uvicorn")
    assert users and all(name.startswith("server/") for name in users)


def test_torch_stays_out_of_the_server() -> None:
    assert not any(name.startswith("server/") for name in users_of("torch"))


def test_kernels_run_from_the_source_tree_of_a_bare_gpu_box() -> None:
    import sys

    for path in (ROOT / "kernels").glob("**/*.py"):
        assert libraries(path) <= KERNEL_LIBRARIES | set(sys.stdlib_module_names), path


def test_readme_maps_every_source_file() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in SOURCES:
        assert f"`{path.name}`" in readme, f"{path.relative_to(ROOT)} is missing from README's map"


def test_tests_mirror_modules() -> None:
    """A test file is named after the module it tests (or stands at the top, about the whole)."""
    modules = {path.relative_to(ROOT) for path in SOURCES}
    for layer in LAYERS:
        for path in (ROOT / "tests" / layer).glob("**/test_*.py"):
            tested = path.relative_to(ROOT / "tests").with_name(path.name.removeprefix("test_"))
            assert tested in modules, f"{path.relative_to(ROOT)} tests no module"
