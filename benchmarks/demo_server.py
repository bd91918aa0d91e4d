"""`nybble serve` with the demo model, as a process, and how long its clients wait."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

_QUESTION = {"role": "user", "content": "What is the capital of France?"}
_DEADLINE = 120.0  # seconds, to load the model


@dataclass(frozen=True)
class DemoServer:
    """client: for its address."""

    client: httpx.Client

    def first_token_seconds(self, num_requests: int) -> float:
        """From a short chat's request to its first token, at a client on this machine: the median."""
        return statistics.median(self._first_token_seconds() for _ in range(num_requests))

    def _first_token_seconds(self) -> float:
        body = {"model": "demo", "messages": [_QUESTION], "temperature": 0, "max_tokens": 8, "stream": True}
        start = time.perf_counter()
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            lines = response.iter_lines()
            next(line for line in lines if re.search(r'"content": ?"[^"]', line))
            seconds = time.perf_counter() - start
            deque(lines, maxlen=0)  # to the end, so that the next request finds nobody at work
        return seconds


@contextmanager
def demo_server(checkpoint: str, *options: str) -> Iterator[DemoServer]:
    """One on a free port, without the prefix cache, so that a repeat must do all the work again."""
    program = str(Path(sys.executable).with_name("nybble"))
    fixed = ("--port", "0", "--served-model-name", "demo", "--no-enable-prefix-caching")
    command = [program, "serve", checkpoint, *fixed, *options]
    with tempfile.NamedTemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            with httpx.Client(base_url=_url(Path(log.name), process), timeout=_DEADLINE) as client:
                yield DemoServer(client)
        finally:
            process.terminate()


def _url(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + _DEADLINE
    while time.monotonic() < deadline and process.poll() is None:
        match = re.search(r"listening on (http://\S+)", log.read_text())
        if match:
            return match[1]
        time.sleep(0.05)
    sys.exit(f"the server did not start:\n{log.read_text()}")
