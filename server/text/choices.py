"""Several answers to one prompt, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

_MAX_UNTAKEN = 256  # items, before the streams wait

Stream = AsyncGenerator[T, None]


async def run_choices(start: Callable[[int], Stream[T]], count: int) -> Stream[tuple[int, T]]:
    """What the streams `start(0)` .. `start(count - 1)` yield, each with its number, as it comes.

    The others start when the first has yielded: then the prompt is computed, and they find it in the prefix
    cache. An exception of one ends all. Closing this closes all at once.
    """
    first = start(0)
    async with aclosing(first):
        async for item in first:
            yield 0, item
            if count > 1:
                break
        else:
            return
        async with aclosing(run_all([first, *map(start, range(1, count))])) as merged:
            async for numbered in merged:
                yield numbered


async def run_all(streams: Sequence[Stream[T]]) -> Stream[tuple[int, T]]:
    """What the streams yield, each with its stream's place, as it comes; ends as `run_choices` does."""
    items: asyncio.Queue[tuple[int, T] | asyncio.Task[None]] = asyncio.Queue()

    room = asyncio.Semaphore(_MAX_UNTAKEN)

    async def pump(number: int, stream: Stream[T]) -> None:
        async with aclosing(stream):
            async for item in stream:
                await room.acquire()
                items.put_nowait((number, item))

    tasks = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(items.put_nowait)
    try:
        num_running = len(tasks)
        while num_running:
            item = await items.get()
            if isinstance(item, asyncio.Task):
                item.result()
                num_running -= 1
            else:
                room.release()
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
