"""Comments on event streams that are silent for long, so that no proxy takes them for dead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from starlette.types import Message, Send

COMMENT = b": keep-alive\n\n"


@asynccontextmanager
async def kept_alive(send: Send, interval: float) -> AsyncGenerator[Send, None]:
    """A `send` for an event stream, beside which a comment is sent after each `interval` seconds of silence.

    Each message must be whole events. Tokens cost no timer: one task looks when the last was sent.
    """
    loop = asyncio.get_running_loop()
    lock = asyncio.Lock()  # a comment must not wait for a slow reader while the stream ends
    last_sent = loop.time()
    is_open = False

    async def kept(message: Message) -> None:
        nonlocal last_sent, is_open
        async with lock:
            await send(message)
            is_open = message["type"] == "http.response.start" or bool(message.get("more_body"))
            last_sent = loop.time()

    async def comment() -> None:
        nonlocal last_sent
        while True:
            await asyncio.sleep(max(0.0, last_sent + interval - loop.time()))
            async with lock:
                if loop.time() < last_sent + interval:
                    continue
                if is_open:
                    await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                last_sent = loop.time()

    task = asyncio.create_task(comment())
    try:
        yield kept
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, OSError):  # OSError: the client is gone, which others notice
            await task
