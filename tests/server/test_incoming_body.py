from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from starlette.requests import Request
from starlette.types import Message

from nybble.server.errors import SlowRequestError, TooLargeError
from nybble.server.incoming_body import read_body
from nybble.server.server_config import ServerConfig


def read(pieces: Sequence[bytes | None], declared: str | None = None, timeout: int = 60) -> bytes:
    """What is read of a body in pieces, of which None never comes."""

    async def receive() -> Message:
        piece = left.pop(0)
        if piece is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    left = list(pieces)
    headers = [(b"content-length", declared.encode())] if declared is not None else []
    request = Request({"type": "http", "headers": headers}, receive)
    return asyncio.run(read_body(request, ServerConfig(max_body_bytes=10, client_timeout=timeout)))


def test_a_body_in_pieces() -> None:
    assert read([b"12345", b"", b"67890"]) == b"1234567890"


@pytest.mark.parametrize("declared", ["11", "9" * 20, "9" * 5000, "0" * 21])
def test_one_that_says_it_is_too_large_is_not_read(declared: str) -> None:
    with pytest.raises(TooLargeError):
        read([None], declared)


@pytest.mark.parametrize("declared", [None, "5", "x", "-1"])
def test_nor_is_one_that_is(declared: str | None) -> None:
    with pytest.raises(TooLargeError, match="10 bytes"):
        read([b"123456", b"78901", None], declared)


def test_one_that_does_not_come_in_time() -> None:
    with pytest.raises(SlowRequestError, match="within 1 s") as caught:
        read([b"1", None], timeout=1)
    assert caught.value.headers() == {"Connection": "close"}
