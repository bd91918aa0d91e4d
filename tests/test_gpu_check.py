"""The check that users run on a GPU box: it starts with little installed, says what is missing, and leaves
files."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check"
SUPPORT = ROOT / "tests" / "support"
INSTALLED = {"numpy", "pytest", "torch", "transformers", "triton"}
# Kernel tests that need more than a GPU box is asked to have; there they are skipped, and the script says
# why.
NEED_MORE = {
    "kernels/test_nvfp4.py": {"hypothesis"},
    "kernels/test_random_bits.py": {"hypothesis"},
    "kernels/triton/test_launch_policy.py": {"llguidance", "msgspec", "safetensors", "tokenizers"},
    "kernels/triton/test_triton_ops.py": {"llguidance", "msgspec", "safetensors", "tokenizers"},
}


def source(module: str) -> Path | None:
    """The file of a module of this repository."""
    package, _, name = module.rpartition(".")
    path = ROOT / Path(*package.split(".")[1:]) / f"{name}.py" if package else SUPPORT / f"{name}.py"
    return path if path.exists() else None


@cache
def libraries(path: Path) -> frozenset[str]:
    """All that importing a file imports from elsewhere, directly or not."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        for module in imported(node):
            own = source(module)
            found |= libraries(own) if own else {module.split(".")[0]}
    return frozenset(found - sys.stdlib_module_names)


def imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return []
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if source(name) else node.module for name in names]


def test_kernel_tests_need_little() -> None:
    needs = {}
    for path in (
        *ROOT.glob("tests/kernels/test_*.py"),
        *(
            path
            for room in ("bench", "compiled", "triton")
            for path in ROOT.glob(f"tests/kernels/{room}/test_*.py")
        ),
        *SUPPORT.glob("test_*.py"),
        ROOT / "tests" / "conftest.py",
    ):
        if more := libraries(path) - INSTALLED:
            needs[str(path.relative_to(ROOT / "tests"))] = more
    assert needs == NEED_MORE


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHON": sys.executable,
        "TRITON_CACHE_DIR": str(ROOT / "build" / "triton-cache"),
    }
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine with no GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert done.returncode == 2
    assert "torch finds no CUDA device" in done.stderr
    assert json.loads((tmp_path / "machine.json").read_text())["torch"] == torch.__version__


def test_what_needs_no_gpu(tmp_path: Path) -> None:
    """A test file that passes, one that fails, and one that needs a library that is not there."""
    failing, lacking = tmp_path / "test_failing.py", tmp_path / "test_lacking.py"
    failing.write_text("def test_it():\n    assert 1 == 2\n")
    lacking.write_text("import no_such_library\n")
    out = tmp_path / "out"
    done = run("--no-gpu", str(out), "tests/kernels/test_fp8.py", str(failing), str(lacking))
    assert done.returncode == 1, done.stderr
    lines = [line.partition(":") for line in (out / "tests.txt").read_text().splitlines()]
    assert sorted(line[0] for line in lines) == [
        f"FAILED  {tmp_path.name}.test_failing",
        "passed  kernels.test_fp8",
        f"skipped {tmp_path.name}.test_lacking",
    ]
    assert {path.name for path in (out / "tests").iterdir()} >= {
        "kernels.test_fp8.log",
        "kernels.test_fp8.xml",
        f"{tmp_path.name}.test_failing.log",
    }
    results = json.loads((out / "bench" / "results.json").read_text())
    assert {row["kind"] for row in results["rows"]} == {"modelled"}
    assert (out / "bench" / "summary.md").exists()
    assert done.stdout.rstrip().endswith(f"results are in {out}; exit code 1")
