"""Python where kernels are compiled, for tests whose own process interprets them.

Started with a module and a function, this file calls it with the arguments that stand on the input as JSON,
and writes what it returns.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
DEADLINE = 240.0  # seconds; only a hang reaches it


def run_ahead_of_time(*command: str, cache: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """`python command...` with `text` on the input; Triton keeps what it compiles in `cache`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(SUPPORT), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *command],
        input=text,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def call_ahead_of_time(module: str, function: str, *arguments: Any, cache: Path) -> Any:
    """What `module.function(*arguments)` returns there; all of it must be JSON. Its error fails the test."""
    done = run_ahead_of_time(__file__, module, function, cache=cache, text=json.dumps(arguments))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    called = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
    json.dump(called(*json.load(sys.stdin)), sys.stdout)
