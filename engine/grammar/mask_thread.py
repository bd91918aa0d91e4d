"""Computes the masks of a step in a thread, so that one that takes too long holds the step up only so long.

Native code cannot be stopped: the thread is left to it, and another one goes on with the rest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol

MAX_MASK_TIME = 0.25  # seconds of processor time for one mask; the other requests wait that long, once


class MaskSource(Protocol):
    def allowed_words(self, drafts: Sequence[int] = ()) -> object:
        """Computes a mask and keeps it."""

    def give_up(self) -> None:
        """A mask takes too long: no more is asked for, though this one is at work on it yet."""


Wanted = tuple[MaskSource, Sequence[int]]  # and after which drafts


class MaskThread:
    def __init__(self, limit: float = MAX_MASK_TIME) -> None:
        """limit: seconds of processor time for one mask."""
        self._limit = limit
        self._work: _Work | None = None

    def compute(self, wanted: Sequence[Wanted]) -> None:
        """All masks, which their sources keep; those that take too long make theirs give up.

        Raises:
            Exception: whatever went wrong.
        """
        while wanted:
            self._work = self._work or _Work()
            num_done = self._work.run(wanted, self._limit)
            if num_done == len(wanted):
                return
            self._work = None
            slow = wanted[num_done][0]
            slow.give_up()
            wanted = [each for each in wanted[num_done + 1 :] if each[0] is not slow]

    def __del__(self) -> None:
        if self._work is not None:
            self._work.end()


class _Work:
    """A thread, which sleeps between two calls of `run`."""

    def __init__(self) -> None:
        self._wanted: Sequence[Wanted] = ()
        self._num_done = 0
        self._error: Exception | None = None
        self._began = 0.0  # processor time of the thread when it began with a mask
        self._is_over = False
        self._asked = threading.Event()
        self._answered = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="masks", daemon=True)
        self._thread.start()

    def run(self, wanted: Sequence[Wanted], limit: float) -> int:
        """How many masks are done; if not all, the next one took too long, and the thread is lost."""
        self._wanted, self._num_done, self._error = wanted, 0, None
        self._began = self._processor_time()
        self._answered.clear()
        self._asked.set()
        while not self._answered.wait(limit):
            if self._processor_time() - self._began > limit:
                self.end()
                return self._num_done
        if self._error is not None:
            raise self._error
        return len(wanted)

    def end(self) -> None:
        """End the thread, once it is not at work on a mask."""
        self._is_over = True
        self._asked.set()

    def _processor_time(self) -> float:
        ident = self._thread.ident
        return 0.0 if ident is None else time.clock_gettime(time.pthread_getcpuclockid(ident))

    def _serve(self) -> None:
        while not self._is_over:
            self._asked.wait()
            self._asked.clear()
            try:
                self._compute()
            except Exception as error:
                self._error = error
            self._answered.set()

    def _compute(self) -> None:
        for number, (source, drafts) in enumerate(self._wanted):
            if self._is_over:
                return
            self._num_done, self._began = number, time.thread_time()
            source.allowed_words(drafts)
