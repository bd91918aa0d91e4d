from __future__ import annotations

import asyncio

from starlette.types import Message

from nybble.server.keep_alive import COMMENT, kept_alive

START: Message = {"type": "http.response.start", "status": 200, "headers": []}


def _body(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_silence_is_filled_from_start_to_end() -> None:
    async def scenario() -> list[Message]:
        sent: list[Message] = []
        commented = asyncio.Event()

        async def send(message: Message) -> None:
            sent.append(message)
            if message.get("body") == COMMENT:
                commented.set()

        async with kept_alive(send, 0.01) as kept:
            await asyncio.sleep(0.05)
            assert sent == []  # not before the start
            await kept(START)
            await commented.wait()
            await kept(_body(b"data: 1\n\n"))
            await kept(_body(b"", more=False))
            number = len(sent)
            await asyncio.sleep(0.05)
            assert len(sent) == number  # not after the end
        return sent

    first, *between, data, end = asyncio.run(asyncio.wait_for(scenario(), timeout=30))
    assert (first, data, end) == (START, _body(b"data: 1\n\n"), _body(b"", more=False))
    assert between and all(message == _body(COMMENT) for message in between)


def test_a_stream_that_flows_has_no_comments() -> None:
    async def scenario() -> None:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async with kept_alive(send, 1000) as kept:
            await kept(START)
            for _ in range(10):
                await kept(_body(b"x"))
                await asyncio.sleep(0)
        assert sent == [START, *[_body(b"x")] * 10]

    asyncio.run(scenario())


def test_a_slow_reader_is_not_overtaken() -> None:
    """While a message waits to be read, no comment is sent; the end comes last."""

    async def scenario() -> None:
        sent: list[Message] = []
        is_read = asyncio.Event()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                await is_read.wait()
            sent.append(message)

        async with kept_alive(send, 0.01) as kept:
            await kept(START)
            task = asyncio.create_task(kept(_body(b"", more=False)))
            await asyncio.sleep(0.05)
            is_read.set()
            await task
            await asyncio.sleep(0.05)
        assert [message for message in sent if message.get("body") != COMMENT] == [
            START,
            _body(b"", more=False),
        ]
        assert sent[-1] == _body(b"", more=False)

    asyncio.run(asyncio.wait_for(scenario(), timeout=30))


def test_a_client_that_is_gone_ends_nothing_else() -> None:
    async def scenario() -> None:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                raise OSError("gone")

        async with kept_alive(send, 0.01) as kept:
            await kept(START)
            await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(scenario(), timeout=30))
