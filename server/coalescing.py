"""Pieces of a byte stream that are there together, as one: one write to the socket, not many.

A write costs more than the token in it, in system calls and in the layers above them. When the client, the
network or this process is behind, tokens queue up; then they go out together, and it catches up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

_MAX_BUFFERED = 1 << 16  # bytes that are taken before they are asked for


async def coalesce(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same bytes, in as few pieces as are ready when one is asked for. Nothing ready waits for more.

    An exception of `pieces` is raised after the bytes before it. Closing this closes `pieces` at once.
    """
    buffer = _Buffer()
    task = asyncio.create_task(buffer.fill(pieces))
    try:
        while data := await buffer.take():
            yield data
        await task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class _Buffer:
    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._is_finished = False
        self._has_some = asyncio.Event()  # or is finished
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def fill(self, pieces: AsyncGenerator[bytes, None]) -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    self._put(piece)
                    if self._size >= _MAX_BUFFERED:
                        self._has_room.clear()
                        await self._has_room.wait()
        finally:
            self._is_finished = True
            self._has_some.set()

    def _put(self, piece: bytes) -> None:
        if not piece:
            return
        self._pieces.append(piece)
        self._size += len(piece)
        self._has_some.set()

    async def take(self) -> bytes:
        """All that is there, or the next piece; nothing when it has ended."""
        await self._has_some.wait()
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        self._has_room.set()
        if not self._is_finished:
            self._has_some.clear()
        return data
