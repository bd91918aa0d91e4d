"""The body of a request, as it arrives: so large at most, and within so much time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from nybble.server.errors import SlowRequestError, TooLargeError
from nybble.server.server_config import ServerConfig


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """Raises TooLargeError, as soon as too many bytes are certain, or SlowRequestError."""
    _check_declared(request, config.max_body_bytes)
    try:
        async with asyncio.timeout(config.client_timeout):
            return await _read(request, config.max_body_bytes)
    except TimeoutError as error:
        message = f"the request body was not there within {config.client_timeout} s"
        raise SlowRequestError(message, code="body_timeout") from error


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _check_declared(request: Request, limit: int) -> None:
    declared = request.headers.get("content-length", "")
    # More digits than any length has are more than int() takes, too.
    if declared.isdecimal() and (len(declared) > 20 or int(declared) > limit):
        raise _too_large(limit)


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"the request body exceeds {limit} bytes", code="request_too_large")
