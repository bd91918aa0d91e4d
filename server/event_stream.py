"""A streamed answer: when it begins, and its server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nybble.server.coalescing import coalesce
from nybble.server.errors import InternalError, api_error
from nybble.server.faults import log_fault
from nybble.server.keep_alive import COMMENT, kept_alive

_json = msgspec.json.Encoder()
_Chunks = AsyncGenerator[Any, None]

_KEEP_ALIVE_SECONDS = 10.0
_ACCEPTED_INTERVAL = 1.0  # seconds between looks


class EventStream(StreamingResponse):
    """The chunks of an answer as events; they are closed at once when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, chunks: _Chunks) -> None:
        self._chunks = chunks
        self._first = asyncio.create_task(_next(chunks))
        self._events = coalesce(self._server_sent_events())
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events, headers=headers)

    async def begin(self, accepted: asyncio.Event) -> None:
        """Wait until there is something to send; raises what a status must tell instead.

        That is the first chunk, or silence after `accepted`, which is set when the engine has taken the
        request: a long prompt may be before it.
        """
        try:
            await asyncio.wait({self._first}, timeout=_KEEP_ALIVE_SECONDS)
            while not self._first.done() and not accepted.is_set():
                await asyncio.wait({self._first}, timeout=_ACCEPTED_INTERVAL)
            if self._first.done():
                self._first.result()
        except BaseException:
            await self._end_first()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Both: a reader that never reads may go before the first event was taken.
        async with (
            aclosing(self._chunks),
            aclosing(self._events),
            kept_alive(send, _KEEP_ALIVE_SECONDS) as kept,
        ):
            try:
                await super().__call__(scope, receive, kept)
            finally:
                await self._end_first()

    async def _end_first(self) -> None:
        """So that the chunks, which it may be waiting in, can be closed."""
        self._first.cancel()
        await asyncio.wait({self._first})
        if not self._first.cancelled():
            self._first.exception()  # else asyncio complains that nobody looked at it

    async def _server_sent_events(self) -> AsyncGenerator[bytes, None]:
        try:
            if not self._first.done():
                yield COMMENT
            yield _event(_json.encode(await self._first))
            async for chunk in self._chunks:
                yield _event(_json.encode(chunk))
        except Exception as error:  # the status is sent: what is left is to say so in the stream
            answer = api_error(error)
            if isinstance(answer, InternalError):
                log_fault(error, "a request failed")
            yield _event(_json.encode(answer.body()))
        yield _event(b"[DONE]")


async def _next(chunks: _Chunks) -> object:
    return await anext(chunks)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
