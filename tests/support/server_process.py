"""`nybble serve` as a process."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

DEADLINE = 60.0  # seconds; only a hang reaches it
NYBBLE = Path(sys.executable).with_name("nybble")


@dataclass
class ServerProcess:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.partition("://")[2].rsplit(":", 1)
        return host, int(port)

    @property
    def engine(self) -> psutil.Process:
        """Beside which there may be the process that checks grammars."""
        name = "nybble.engine.engine_process"
        (child,) = (one for one in psutil.Process(self.process.pid).children() if name in one.cmdline())
        return child

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """A connection, whose system buffer may be small: then a reader that is slow is soon noticed."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(DEADLINE)
        try:
            sock.connect(self.address)
        except OSError:
            sock.close()
            raise
        return sock

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE)


def start_server(checkpoint: Path, directory: Path, *options: str) -> tuple[subprocess.Popen[bytes], Path]:
    """A server process on a free port, and the file that it logs to."""
    log = directory / "log"
    with log.open("w") as output:
        command = [NYBBLE, "serve", checkpoint, "--port", "0", *options]
        return subprocess.Popen(command, stderr=output), log


def wait_until_listening(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and process.poll() is None:
        match = re.search(r"listening on (https?://[^\s\"]+)", log.read_text())
        if match:
            return match[1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


@contextmanager
def running_server(checkpoint: Path, directory: Path, *options: str) -> Iterator[ServerProcess]:
    """A server named "tiny" that is there until the end, and then is killed if it still runs."""
    process, log = start_server(checkpoint, directory, "--served-model-name", "tiny", *options)
    try:
        yield ServerProcess(wait_until_listening(log, process), process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
