"""`nybble bench ops`: the kernels' own benchmark program, and plots of what it found.

The program runs in a process of its own: it needs torch and Triton only, so that kernels can be measured
where nothing else is installed, and Triton must not be in the mode in which tests interpret kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = "nybble.kernels.bench.program"
_RESULTS = "results.json"


def bench_ops(arguments: Sequence[str]) -> int:
    """Run it with these arguments; its exit code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    directory = _out(arguments)
    before = _written(directory)
    code = subprocess.run([sys.executable, "-m", _PROGRAM, *arguments], env=environment).returncode
    if directory is not None and _written(directory) != before:
        draw_plots(directory)
    return code


def draw_plots(directory: Path) -> None:
    """Of the results there. Where matplotlib is missing, say so."""
    try:
        from nybble.server.bench.bench_plots import save_plots
    except ImportError as error:
        print(f"no plots: {error} (pip install 'nybble[bench]')", file=sys.stderr)
        return
    results = json.loads((directory / _RESULTS).read_text())
    for path in save_plots(results["rows"], directory):
        print(f"wrote {path}")


def _out(arguments: Sequence[str]) -> Path | None:
    """Where the program writes; what else it is told is its own business."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--out", type=Path)
    try:
        directory: Path | None = parser.parse_known_args(arguments)[0].out
    except argparse.ArgumentError:  # the program says it better
        return None
    return directory


def _written(directory: Path | None) -> int | None:
    """When results were written there, if they were."""
    path = None if directory is None else directory / _RESULTS
    return path.stat().st_mtime_ns if path is not None and path.exists() else None
