"""Servers for real clients. Nothing here takes Nybble's own libraries: a client has its own environment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent.parent / "support"
PYTHON = os.environ.get("NYBBLE_PYTHON", sys.executable)  # that has Nybble
DEADLINE = 200.0  # seconds; only a hang reaches it

# Clients that only scripts/test_clients installs.
CLIENTS = ("langchain_openai", "litellm", "llm", "schemathesis")
collect_ignore = [f"test_{name}.py" for name in CLIENTS if find_spec(name) is None]


@contextmanager
def served(log: Path, script: str, *arguments: str) -> Iterator[str]:
    """The address of a server, which must end when it is told to, without a traceback."""
    with log.open("w") as output:
        process = subprocess.Popen([PYTHON, SUPPORT / script, *arguments], stderr=output)
    try:
        yield _address(log, process)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(DEADLINE)
    assert code in (0, -signal.SIGTERM) and "Traceback" not in log.read_text(), log.read_text()


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and process.poll() is None:
        match = re.search(r"listening on (http://\S+)", log.read_text())
        if match:
            return match[1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API over an engine that writes what the last message says."""
    with served(tmp_path_factory.mktemp("parrot") / "log", "parrot_server.py") as url:
        yield url


@pytest.fixture(scope="session")
def random_glm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`nybble serve` over a model with random weights: only a grammar makes sense of what it writes."""
    directory = tmp_path_factory.mktemp("random")
    with served(directory / "log", "tiny_server.py", str(directory / "checkpoint")) as url:
        yield url
