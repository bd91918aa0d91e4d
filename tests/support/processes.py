"""Every process that a test starts, and all that those start, even when their parents are gone."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from nybble.engine.ranks.tuning import TUNING

DEADLINE = 60.0  # seconds; only a hang reaches it


class Family:
    """The processes with `environment`; children inherit it."""

    def __init__(self) -> None:
        self.mark = {"NYBBLE_TEST_FAMILY": uuid.uuid4().hex}
        self.environment = TUNING | os.environ | self.mark

    def members(self) -> list[psutil.Process]:
        """Those that run, oldest first. Not this process, and none that only waits to be reaped."""
        return [process for process in psutil.process_iter() if self._has(process)]

    def rank(self, rank: int, module: str) -> psutil.Process:
        """The process of one rank that runs `module`: a rank's own children have its variables too."""
        (process,) = (
            process
            for process in self.members()
            if process.environ().get("RANK") == str(rank) and module in process.cmdline()
        )
        return process

    def is_gone(self) -> bool:
        return not self.members()

    def kill(self) -> None:
        while members := self.members():
            for process in members:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(members, timeout=0.05)

    def _has(self, process: psutil.Process) -> bool:
        if process.pid == os.getpid():
            return False
        try:
            variables: dict[str, str] = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # a zombie is a NoSuchProcess
            return False
        return self.mark.items() <= variables.items()


@contextmanager
def family() -> Iterator[Family]:
    """A family that ends with the test, however that ends."""
    processes = Family()
    try:
        yield processes
    finally:
        processes.kill()


def wait_until(condition: Callable[[], object], seconds: float = DEADLINE) -> None:
    """Poll: a process gives no other sign. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s")
        time.sleep(0.01)
