"""What each key has used: a file of JSON lines to which every request adds one when it ends.

A line is one write: with it, it is in the operating system's hands, and survives the server's death. `sync`,
which the server calls every few seconds and at its end, puts it on the disk: what was written since may be
lost with the machine. A last line that was cut off is dropped. Requests that run while the server is killed
leave no line.

The file holds one day (UTC). With the first line of another it is renamed, use.jsonl to use-2026-11-26.jsonl.
Such files are never read again: whoever runs the server may take them away.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import msgspec
from msgspec import Struct

from nybble.engine.errors import NybbleError

logger = logging.getLogger("nybble.server")

_DAY = 86400  # seconds


class LedgerError(NybbleError):
    """A ledger that cannot be used."""


class LedgerEntry(Struct, frozen=True, kw_only=True):
    """What a request has used on a day. time: Unix time at which it or the day ended; cost: US dollars."""

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
    return int(unix_time // _DAY)


def end_of_day(day: int) -> float:
    """The Unix time of its last millisecond."""
    return (day + 1) * _DAY - 0.001


class UsageLedger:
    """Open for one server at a time, which a file with `.lock` added to its name sees to."""

    def __init__(self, path: Path) -> None:
        """Raises LedgerError."""
        self._path = path
        self._is_synced = True
        self._full: list[int] = []  # files of former days, to be synced and closed
        self._sync_lock = threading.Lock()
        with ExitStack() as opened:  # closes what is open if the rest fails
            self._lock = _locked(path)
            opened.callback(os.close, self._lock)
            try:
                self._file = _open(path)
                opened.callback(os.close, self._file)
                self._drop_cut_line()
            except OSError as error:
                raise LedgerError(f"{path}: {error}") from error
            self._day = self._last_day()
            opened.pop_all()

    def sums(self, day: int) -> dict[str, DayUse]:
        """By key, what was used on a day (`day_of`). Raises LedgerError: it names the line at fault."""
        sums: dict[str, DayUse] = defaultdict(DayUse)
        for entry in self._entries():
            if day_of(entry.time) == day:
                sums[entry.key].tokens += entry.prompt_tokens + entry.completion_tokens
                sums[entry.key].cost += entry.cost
        return sums

    def append(self, entry: LedgerEntry) -> None:
        """A disk that is full must not end an answer: it is logged, and sums in memory go on."""
        self._turn_day(day_of(entry.time))
        line = msgspec.json.encode(entry) + b"\n"
        try:
            written = os.write(self._file, line)
            self._is_synced = False
            if written < len(line):
                self._drop_cut_line()
                raise OSError("no room")
        except OSError as error:
            logger.error("%s: a line was lost: %s", self._path, error)

    def sync(self) -> None:
        """Put on the disk what was written. Blocks; may be called from another thread than the rest."""
        with self._sync_lock:
            if self._is_synced:
                return
            self._is_synced = True
            try:
                self._sync_files()
            except OSError as error:
                self._is_synced = False
                logger.error("%s: not on the disk yet: %s", self._path, error)

    def _sync_files(self) -> None:
        while self._full:
            os.fsync(self._full[0])
            os.close(self._full.pop(0))
        os.fsync(self._file)
        _sync_directory(self._path.parent)

    def close(self) -> None:
        self.sync()
        os.close(self._file)
        os.close(self._lock)

    def _turn_day(self, day: int) -> None:
        if self._day is not None and day > self._day:
            try:
                self._put_away(self._day)
            except OSError as error:  # goes on in the same file, and is tried again
                logger.error("%s: a new file could not be begun: %s", self._path, error)
                return
        self._day = max(day, self._day or 0)

    def _put_away(self, day: int) -> None:
        if self._path.exists():
            self._path.rename(self._name_of(day))
        new = _open(self._path)
        self._full.append(self._file)
        self._file = new

    def _name_of(self, day: int) -> Path:
        """Where the lines of a day go; with a number where that exists, since clocks are set back."""
        date = datetime.fromtimestamp(day * _DAY, UTC).date()
        for number in count():
            ending = f".{number}" if number else ""
            path = self._path.with_name(f"{self._path.stem}-{date}{ending}{self._path.suffix}")
            if not path.exists():
                break
        return path

    def _entries(self) -> Iterator[LedgerEntry]:
        decoder = msgspec.json.Decoder(LedgerEntry)
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise LedgerError(f"{self._path}: line {number}: {error}") from error

    def _last_day(self) -> int | None:
        return max((day_of(entry.time) for entry in self._entries()), default=None)

    def _drop_cut_line(self) -> None:
        size = os.fstat(self._file).st_size
        end = _end_of_lines(self._file, size)
        if end < size:
            os.ftruncate(self._file, end)
            logger.warning("%s: dropped a last line that was cut off", self._path)


def _end_of_lines(file: int, size: int) -> int:
    """Where the last whole line ends."""
    while size:
        start = max(0, size - (1 << 16))
        end = os.pread(file, size - start, start).rfind(b"\n") + 1
        if end:
            return start + end
        size = start
    return 0


def _locked(path: Path) -> int:
    """Raises LedgerError: another server has it, or there cannot be such a file."""
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LedgerError(f"{path}.lock: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise LedgerError(f"{path}: used by another server: {error}") from error
    return lock


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)


def _sync_directory(path: Path) -> None:
    """So that names are on the disk, too."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
