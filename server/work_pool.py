"""Threads for what takes long on a request's text: templates and tokenizers, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from nybble.server.errors import TimedOutError

T = TypeVar("T")


class WorkPool:
    """At most `num_threads` pieces of work at once; more wait for their turn, the loop does not.

    Work that is late is given up: what has not begun never does, what has begun ends on its own.
    """

    def __init__(self, num_threads: int, time_limit: float) -> None:
        """time_limit: seconds from when work is asked for."""
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="work")
        self._time_limit = time_limit

    async def run(self, work: Callable[[], T]) -> T:
        """Raises TimedOutError: it was not done in time."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._time_limit):
                return await loop.run_in_executor(self._threads, work)
        except TimeoutError as error:
            message = f"reading the request took longer than {self._time_limit:g} s"
            raise TimedOutError(message, code="preparation_timeout") from error
