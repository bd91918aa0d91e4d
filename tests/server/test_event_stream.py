from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

import pytest
from starlette.types import Message

from nybble.engine.errors import QueueFullError
from nybble.server.event_stream import EventStream


async def _chunks(closed: list[str], *steps: object) -> AsyncGenerator[object, None]:
    """Yields; waits for events; raises."""
    try:
        for step in steps:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, Exception):
                raise step
            else:
                yield step
    finally:
        closed.append("closed")


async def _send_all(stream: EventStream) -> bytes:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    assert sent[0]["status"] == 200
    return b"".join(message.get("body", b"") for message in sent)


def test_chunks_as_events() -> None:
    async def scenario() -> None:
        closed: list[str] = []
        stream = EventStream(_chunks(closed, {"a": 1}, ["b"]))
        await stream.begin(asyncio.Event())
        assert await _send_all(stream) == b'data: {"a":1}\n\ndata: ["b"]\n\ndata: [DONE]\n\n'
        assert closed == ["closed"]

    asyncio.run(scenario())


def test_what_a_status_must_tell_is_raised() -> None:
    async def scenario() -> None:
        closed: list[str] = []
        accepted = asyncio.Event()
        accepted.set()
        with pytest.raises(QueueFullError):
            await EventStream(_chunks(closed, QueueFullError("full", 1.0))).begin(accepted)
        assert closed == ["closed"]

    asyncio.run(scenario())


def test_giving_up_before_it_begins_closes_the_chunks() -> None:
    async def scenario() -> None:
        closed: list[str] = []
        begin = asyncio.create_task(EventStream(_chunks(closed, asyncio.Event())).begin(asyncio.Event()))
        await asyncio.sleep(0.01)
        assert not begin.done()
        begin.cancel()
        with suppress(asyncio.CancelledError):
            await begin
        assert closed == ["closed"]

    asyncio.run(scenario())
