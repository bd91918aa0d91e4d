"""Whether the engine really decodes: a process that is alive may hang."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from contextlib import aclosing

from nybble.engine.engine_client import ObservedEngine
from nybble.engine.errors import NybbleError
from nybble.engine.messages import Request, SamplingParams
from nybble.server.errors import UnavailableError

_FIRST = -(2**31)  # the priority before all others
_FRESH = 0.1  # of the timeout: a token so young needs no question
_TENANT = "nybble:ready"  # no API key has this name


class Readiness:
    """A token that came within `timeout` seconds is proof; else two are asked for, which takes a decode step.

    They are asked for when no token has come for a tenth of that, though nobody waits for them yet. So who
    asks every I seconds learns of a hang within `timeout` + I: the question begins at most I after the
    tenth, and has nine tenths. Those who ask meanwhile wait for the same answer; after a failure the next
    question is asked at once, but not waited for. `clock` is that of the engine's `last_token_time`.
    """

    def __init__(
        self, engine: ObservedEngine, timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._timeout = timeout
        self._clock = clock
        self._numbers = itertools.count()
        self._probe: asyncio.Task[None] | None = None
        self._failure: str | None = None  # of the last one that ended, and when it did
        self._failure_time = 0.0

    async def check(self) -> None:
        """Raises UnavailableError, which says why."""
        if not self._engine.is_alive:
            raise UnavailableError("the engine is not running", code="not_ready")
        age = self._seconds_since_token()
        if age < _FRESH * self._timeout:
            return
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._decode())
            self._probe.add_done_callback(_notice)
        if age < self._timeout:
            return
        if self._failure is not None and self._clock() - self._failure_time < self._timeout:
            raise UnavailableError(self._failure, code="not_ready")
        await asyncio.shield(self._probe)  # who asks may go; others still wait

    def _seconds_since_token(self) -> float:
        last = self._engine.last_token_time
        return math.inf if last is None else self._clock() - last

    async def _decode(self) -> None:
        self._failure = await self._find_failure()
        self._failure_time = self._clock()
        if self._failure is not None:
            raise UnavailableError(self._failure, code="not_ready")

    async def _find_failure(self) -> str | None:
        """What is wrong, if anything."""
        limit = (1 - _FRESH) * self._timeout
        try:
            async with asyncio.timeout(limit):
                await self._two_tokens()
        except TimeoutError:
            return f"the engine has given no token in {limit:g} s"
        except NybbleError as error:
            return f"the engine does not decode: {error}"
        return None

    async def _two_tokens(self) -> None:
        request = Request(
            request_id=f"ready-{next(self._numbers)}",
            prompt_token_ids=(0,),
            sampling=SamplingParams(max_tokens=2, temperature=0.0),
            priority=_FIRST,
            tenant=_TENANT,
            cache_salt=_TENANT,
        )
        async with aclosing(self._engine.generate(request)) as groups:
            async for _ in groups:
                pass


def _notice(probe: asyncio.Task[None]) -> None:
    """Take note of how it ended: all who asked may have gone."""
    if not probe.cancelled():
        probe.exception()
