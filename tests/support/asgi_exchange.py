"""One request to an ASGI app, with its disconnection and its reading speed in the test's hands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message


class Exchange:
    """Start with `start`. `messages` is what the app sent; clear `is_reading` to block its next send.

    With `is_complete` False the body is only begun.
    """

    def __init__(
        self,
        app: ASGIApp,
        body: dict[str, Any],
        is_complete: bool = True,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        path = "/v1/chat/completions"
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},  # as uvicorn has it
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait(
            {"type": "http.request", "body": json.dumps(body).encode(), "more_body": not is_complete}
        )
        self._sent = asyncio.Condition()
        self._disconnected = asyncio.Event()
        self.messages: list[Message] = []
        self.is_reading = asyncio.Event()
        self.is_reading.set()
        self.send_blocked = asyncio.Event()

    def start(self) -> asyncio.Task[None]:
        async def run() -> None:
            await self._app(self._scope, self._receive, self._send)

        return asyncio.create_task(run())

    def disconnect(self) -> None:
        self._disconnected.set()
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def content_received(self, data: bytes) -> None:
        """Wait until the body that was sent holds `data`."""
        async with self._sent:
            await self._sent.wait_for(lambda: data in self.body)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    async def _receive(self) -> Message:
        if self._disconnected.is_set() and self._incoming.empty():
            return {"type": "http.disconnect"}  # again and again, as uvicorn does
        return await self._incoming.get()

    async def _send(self, message: Message) -> None:
        if not self.is_reading.is_set():
            self.send_blocked.set()
            await self.is_reading.wait()
        async with self._sent:
            self.messages.append(message)
            self._sent.notify_all()
