from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.coalescing import coalesce


class Source:
    """Yields what `queue` has: bytes, None at the end, or an exception to be raised."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.num_taken = 0
        self.is_closed = False

    def put(self, *items: bytes | Exception | None) -> None:
        for item in items:
            self.queue.put_nowait(item)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                self.num_taken += 1
                yield item
        finally:
            self.is_closed = True


def test_what_is_there_together_comes_together() -> None:
    async def run() -> None:
        source = Source()
        pieces = coalesce(source.stream())
        source.put(b"a", b"b", b"c")
        assert await anext(pieces) == b"abc"
        source.put(b"d")
        assert await anext(pieces) == b"d"  # nothing waits for more
        waiting = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        source.put(b"e", b"f", None)
        assert await waiting == b"ef"
        assert [piece async for piece in pieces] == [] and source.is_closed

    asyncio.run(run())


def test_an_exception_comes_after_the_bytes_before_it() -> None:
    async def run() -> None:
        source = Source()
        source.put(b"a", b"b", ValueError("boom"))
        pieces = coalesce(source.stream())
        assert await anext(pieces) == b"ab"
        with pytest.raises(ValueError, match="boom"):
            await anext(pieces)
        assert source.is_closed

    asyncio.run(run())


def test_closing_it_closes_the_source() -> None:
    async def run() -> None:
        source = Source()
        pieces = coalesce(source.stream())
        source.put(b"a")
        await anext(pieces)
        await pieces.aclose()
        assert source.is_closed and len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_not_everything_is_taken_for_a_reader_that_waits() -> None:
    async def run() -> None:
        source = Source()
        source.put(*[b"x" * (1 << 14)] * 10, None)
        pieces = coalesce(source.stream())
        first = await anext(pieces)
        await asyncio.sleep(0.01)
        assert len(first) == 4 << 14 and source.num_taken == 8
        assert len(first + b"".join([piece async for piece in pieces])) == 10 << 14

    asyncio.run(run())


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.booleans()), max_size=20))
def test_the_same_bytes(items: list[tuple[bytes, bool]]) -> None:
    async def run() -> bytes:
        async def stream() -> AsyncGenerator[bytes, None]:
            for data, pauses in items:
                if pauses:
                    await asyncio.sleep(0)
                yield data

        return b"".join([piece async for piece in coalesce(stream())])

    assert asyncio.run(run()) == b"".join(data for data, _ in items)
