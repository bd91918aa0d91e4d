from __future__ import annotations

import asyncio

import pytest
from starlette.responses import Response
from starlette.types import Message

from nybble.server.http_checks import CheckRequests


def answer(*headers: tuple[bytes, bytes], method: str = "POST") -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": method, "headers": list(headers)}
    asyncio.run(CheckRequests(Response("fine"))(scope, receive, send))
    return sent


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ([(b"content-length", b"5"), (b"transfer-encoding", b"chunked")], 400, b"invalid_http"),
        ([(b"content-encoding", b"gzip")], 415, b"unsupported_encoding"),
        ([(b"sec-fetch-site", b"cross-site")], 403, b"cross_site"),
        ([(b"content-encoding", b"br")], 415, b"unsupported_encoding"),
        ([(b"content-encoding", b"identity"), (b"content-encoding", b"zstd")], 415, b"unsupported_encoding"),
    ],
)
def test_what_is_refused(headers: list[tuple[bytes, bytes]], status: int, code: bytes) -> None:
    start, body = answer(*headers)
    assert start["status"] == status and code in body["body"]
    assert dict(start["headers"])[b"connection"] == b"close"


@pytest.mark.parametrize(
    "header",
    [(b"content-length", b"5"), (b"transfer-encoding", b"chunked"), (b"content-encoding", b"Identity")],
)
def test_what_is_not(header: tuple[bytes, bytes]) -> None:
    start, body = answer(header)
    assert (start["status"], body["body"]) == (200, b"fine")


@pytest.mark.parametrize("site", [b"same-origin", b"same-site", b"none"])
def test_pages_of_ones_own_may_send(site: bytes) -> None:
    assert answer((b"sec-fetch-site", site))[0]["status"] == 200


def test_links_may_be_followed() -> None:
    assert answer((b"sec-fetch-site", b"cross-site"), method="GET")[0]["status"] == 200
