from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from nybble.server.text.choices import run_choices


class _Streams:
    """Each yields its number times 100 and up, one by one as it is let."""

    def __init__(self, lengths: list[int], failing: int | None = None) -> None:
        self._lengths = lengths
        self._failing = failing
        self.started: list[int] = []
        self.ended: list[int] = []

    async def start(self, number: int) -> AsyncGenerator[int, None]:
        self.started.append(number)
        try:
            for item in range(self._lengths[number]):
                await asyncio.sleep(0)
                yield 100 * number + item
            if number == self._failing:
                raise ValueError(f"stream {number}")
        finally:
            self.ended.append(number)


async def _collect(streams: _Streams, count: int) -> list[tuple[int, int]]:
    return [item async for item in run_choices(streams.start, count)]


@pytest.mark.parametrize("lengths", [[3], [0], [1, 4, 0], [3, 0, 5, 1], [1] * 8])
def test_every_item_comes_once_and_in_the_order_of_its_stream(lengths: list[int]) -> None:
    streams = _Streams(lengths)
    items = asyncio.run(_collect(streams, len(lengths)))
    for number, length in enumerate(lengths):
        own = [item for stream, item in items if stream == number]
        assert own == [100 * number + n for n in range(length)]
    assert sorted(streams.ended) == sorted(streams.started)


def test_the_others_start_when_the_first_has_yielded() -> None:
    async def scenario() -> None:
        streams = _Streams([3, 1])
        async with aclosing(run_choices(streams.start, 2)) as items:
            assert await anext(items) == (0, 0)
            assert streams.started == [0]
            await anext(items)
            assert streams.started == [0, 1]

    asyncio.run(scenario())


@pytest.mark.parametrize("num_taken", [1, 2, 4])
def test_closing_early_closes_all_at_once(num_taken: int) -> None:
    async def scenario() -> None:
        streams = _Streams([9, 9, 9])
        items = run_choices(streams.start, 3)
        for _ in range(num_taken):
            await anext(items)
        await items.aclose()
        assert sorted(streams.ended) == sorted(streams.started)

    asyncio.run(scenario())


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_of_one_ends_all(failing: int) -> None:
    streams = _Streams([2, 2, 50] if failing != 2 else [50, 50, 2], failing)
    with pytest.raises(ValueError, match=f"stream {failing}"):
        asyncio.run(_collect(streams, 3))
    assert sorted(streams.ended) == sorted(streams.started) == [0, 1, 2]


def test_an_exception_before_the_first_item() -> None:
    with pytest.raises(ValueError, match="stream 0"):
        asyncio.run(_collect(_Streams([0, 3], failing=0), 2))


@pytest.mark.parametrize("count", [2, 8])
def test_streams_wait_for_whoever_takes_their_items(count: int) -> None:
    """So that a reader that is slow does not fill the memory."""

    async def scenario() -> None:
        made = 0

        async def start(number: int) -> AsyncGenerator[int, None]:
            nonlocal made
            for item in range(2000):
                made += 1
                yield item

        async with aclosing(run_choices(start, count)) as items:
            for num_taken in range(1, 1000):
                await anext(items)
                for _ in range(5):
                    await asyncio.sleep(0)
                assert made <= num_taken + 256 + count

    asyncio.run(asyncio.wait_for(scenario(), 60))
