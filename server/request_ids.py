"""Gives each request an id, told in its answer: the client's own x-request-id if it is one, or a new."""

from __future__ import annotations

import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADER = b"x-request-id"
_ALLOWED = re.compile(rb"[A-Za-z0-9._:-]{1,128}")  # nothing that could break a header or a log line


class RequestIds:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = _given_id(scope) or uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (_HEADER, name)]}
            await send(message)

        await self._app(scope, receive, send_with_id)


def _given_id(scope: Scope) -> bytes | None:
    given = [value for name, value in scope["headers"] if name == _HEADER]
    return bytes(given[0]) if len(given) == 1 and _ALLOWED.fullmatch(given[0]) else None
