"""What each key has used: a file of JSON lines to which every request adds one when it ends.

A line is in the operating system's hands when it is written: it survives the server's death, and may be lost
with the machine's. A last line that was cut off is dropped.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from nybble.engine.errors import NybbleError

logger = logging.getLogger("nybble.server")


class LedgerError(NybbleError):
    """A ledger that cannot be used."""


class LedgerEntry(Struct, frozen=True, kw_only=True):
    """time: Unix time at which the request ended; cost: US dollars."""

    time: float
    key: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: float


@dataclass
class DayUse:
    """tokens: of prompts and answers; cost: US dollars."""

    tokens: int = 0
    cost: float = 0.0


def day_of(unix_time: float) -> int:
    """Days since 1970, in UTC."""
    return int(unix_time // 86400)


class UsageLedger:
    """Open for one server at a time. Raises LedgerError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise LedgerError(f"{path}: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._drop_cut_line()
        except OSError as error:
            self.close()
            raise LedgerError(f"{path}: used by another server, or not a file: {error}") from error

    def sums(self, day: int) -> dict[str, DayUse]:
        """By key, what was used on a day (`day_of`). Raises LedgerError: it names the line at fault."""
        decoder = msgspec.json.Decoder(LedgerEntry)
        sums: dict[str, DayUse] = defaultdict(DayUse)
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entry = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise LedgerError(f"{self._path}: line {number}: {error}") from error
                if day_of(entry.time) == day:
                    sums[entry.key].tokens += entry.prompt_tokens + entry.completion_tokens
                    sums[entry.key].cost += entry.cost
        return sums

    def append(self, entry: LedgerEntry) -> None:
        """A disk that is full must not end an answer: it is logged, and sums in memory go on."""
        line = msgspec.json.encode(entry) + b"\n"
        try:
            written = os.write(self._file, line)
        except OSError as error:
            logger.error("%s: a line was lost: %s", self._path, error)
            return
        if written < len(line):
            self._drop_cut_line()
            logger.error("%s: a line was lost: no room", self._path)

    def close(self) -> None:
        os.close(self._file)

    def _drop_cut_line(self) -> None:
        size = os.fstat(self._file).st_size
        end = self._path.read_bytes().rfind(b"\n") + 1 if size else 0
        if end < size:
            os.ftruncate(self._file, end)
            logger.warning("%s: dropped a last line that was cut off", self._path)
