"""Whether the engine really decodes: a process that is alive may hang."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import aclosing

from nybble.engine.engine_client import ObservedEngine
from nybble.engine.errors import NybbleError
from nybble.engine.messages import Request, SamplingParams
from nybble.server.errors import UnavailableError

_FIRST = -(2**31)  # the priority before all others
_TENANT = "nybble:ready"  # no API key has this name


class Readiness:
    """A token that came within `timeout` seconds is proof; else two are asked for, which takes a decode step.

    Those who ask meanwhile wait for the same answer. `clock` is that of the engine's `last_token_time`.
    """

    def __init__(
        self, engine: ObservedEngine, timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._timeout = timeout
        self._clock = clock
        self._numbers = itertools.count()
        self._probe: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Raises UnavailableError, which says why."""
        if not self._engine.is_alive:
            raise UnavailableError("the engine is not running", code="not_ready")
        last = self._engine.last_token_time
        if last is not None and self._clock() - last < self._timeout:
            return
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._decode())
            self._probe.add_done_callback(_notice)
        await asyncio.shield(self._probe)  # who asks may go; others still wait

    async def _decode(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._two_tokens()
        except TimeoutError:
            message = f"the engine has given no token for {self._timeout:g} s"
            raise UnavailableError(message, code="not_ready") from None
        except NybbleError as error:
            raise UnavailableError(f"the engine does not decode: {error}", code="not_ready") from error

    async def _two_tokens(self) -> None:
        request = Request(
            request_id=f"ready-{next(self._numbers)}",
            prompt_token_ids=(0,),
            sampling=SamplingParams(max_tokens=2, temperature=0.0),
            priority=_FIRST,
            tenant=_TENANT,
            cache_salt=_TENANT,
        )
        async with aclosing(self._engine.generate(request)) as events:
            async for _ in events:
                pass


def _notice(probe: asyncio.Task[None]) -> None:
    """Take note of how it ended: all who asked may have gone."""
    if not probe.cancelled():
        probe.exception()
