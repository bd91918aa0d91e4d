"""The protocol under uvicorn, over a socket: time limits, and requests that two may read differently."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nybble.server.http_checks import CheckRequests
from nybble.server.http_protocol import http_protocol

TIMEOUT = 1.0  # seconds that the server gives a head
DEADLINE = 30.0


async def echo(request: Request) -> Response:
    """The path and the body as they were understood."""
    return Response(request.scope["path"].encode() + b" " + await request.body())


async def ignore(request: Request) -> Response:
    return Response(b"unread", 401)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    routes = [
        Route("/ignore", ignore, methods=["POST"]),
        Route("/{path:path}", echo, methods=["GET", "POST"]),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(CheckRequests)])
    settings = uvicorn.Config(app, http=http_protocol(TIMEOUT), ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(settings)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=asyncio.run, args=(server.serve([sock]),))
        thread.start()
        yield sock.getsockname()[1]
        server.should_exit = True
        thread.join(DEADLINE)


@pytest.fixture
def connection(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as connection:
        yield connection


def until_closed(connection: socket.socket, drip: bytes = b"") -> tuple[bytes, float]:
    """What comes until the server closes, and after how long; `drip` is sent byte by byte meanwhile."""
    start, received, left = time.monotonic(), b"", list(drip)
    connection.settimeout(0.05)
    while time.monotonic() - start < DEADLINE:
        try:
            piece = connection.recv(1 << 16)
            if not piece:
                return received, time.monotonic() - start
            received += piece
        except TimeoutError:
            if left:
                connection.send(bytes([left.pop(0)]))
        except ConnectionError:
            return received, time.monotonic() - start
    raise AssertionError("the server kept the connection")


def receive_until(connection: socket.socket, ending: bytes) -> None:
    received = b""
    while not received.endswith(ending):
        received += connection.recv(1 << 16)
        assert received


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("drip", [b"", b"GET /a HTTP/1.1\r\nX: " + b"x" * 1000])
def test_a_head_that_does_not_come_in_time_is_not_waited_for(connection: socket.socket, drip: bytes) -> None:
    """Whether nothing comes or a byte now and then."""
    received, seconds = until_closed(connection, drip)
    assert received == b"" and TIMEOUT * 0.9 <= seconds < TIMEOUT + 10


def test_nor_is_the_next_one(connection: socket.socket) -> None:
    connection.sendall(GET)
    receive_until(connection, b"/a ")
    received, seconds = until_closed(connection, b"G" * 1000)
    assert received == b"" and seconds < TIMEOUT + 10


def test_nor_is_the_rest_of_a_body_that_nobody_reads(connection: socket.socket) -> None:
    connection.sendall(b"POST /ignore HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
    received, seconds = until_closed(connection, b"x" * 999)
    assert status_of(received) == 401 and seconds < TIMEOUT + 10


def test_a_head_in_pieces_is_read(connection: socket.socket) -> None:
    for piece in (GET[:9], GET[9:20], GET[20:]):
        connection.sendall(piece)
        time.sleep(0.05)
    receive_until(connection, b"/a ")


def test_an_answer_may_take_longer_than_a_head(connection: socket.socket) -> None:
    connection.sendall(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n1")
    time.sleep(TIMEOUT * 1.5)
    connection.sendall(b"2")
    receive_until(connection, b"/a 12")


POST = b"POST /a HTTP/1.1\r\nHost: x\r\n"
REFUSED = {
    "a length and chunks": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": POST + b"Content-Length: 3, 4\r\n\r\nabcd",
    "a signed length": POST + b"Content-Length: +3\r\n\r\nabc",
    "a negative length": POST + b"Content-Length: -3\r\n\r\nabc",
    "a hexadecimal length": POST + b"Content-Length: 0x3\r\n\r\nabc",
    "an unknown encoding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two encodings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "encodings twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a space before a colon": POST + b"Content-Length : 3\r\n\r\nabc",
    "a zero byte": POST + b"X: a\0b\r\n\r\n",
    "a lone carriage return": POST + b"X: a\rContent-Length: 3\r\n\r\nabc",
    "a header without a name": POST + b": x\r\n\r\n",
    "two hosts": b"GET /a HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "no host": b"GET /a HTTP/1.1\r\n\r\n",
    "a space in the target": b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes that are no text": b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_may_be_read_in_two_ways_is_refused(connection: socket.socket, name: str) -> None:
    """Once, in JSON, and the connection is closed: nothing after it is read as a request."""
    connection.sendall(REFUSED[name] + b"\r\n" + GET)
    answer, _ = until_closed(connection)
    assert status_of(answer) in (400, 501) and len(re.findall(rb"HTTP/1.1 \d", answer)) == 1
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "invalid_http"


@pytest.mark.parametrize(
    ("chunks", "body"),
    [
        (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
        (b"3;x=y\r\nabc\r\n0\r\n\r\n", b"abc"),
        (b"003\r\nabc\r\n0\r\nX: y\r\n\r\n", b"abc"),
        (b"-3\r\nabc\r\n0\r\n\r\n", None),
        (b"0x3\r\nabc\r\n0\r\n\r\n", None),
        (b"ffffffffffffffffffffffffffff\r\nabc", None),
        (b"3\r\nabcd\r\n0\r\n\r\n", None),
    ],
)
def test_chunks(connection: socket.socket, chunks: bytes, body: bytes | None) -> None:
    connection.sendall(POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks)
    answer, _ = until_closed(connection)
    assert answer.endswith(b"/a " + body) if body is not None else status_of(answer) == 400


def test_bad_chunks_of_a_body_that_nobody_reads_close_the_connection(connection: socket.socket) -> None:
    """The answer was given already: it stays the only one."""
    connection.sendall(b"POST /ignore HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    receive_until(connection, b"unread")
    connection.sendall(b"nonsense\r\n\r\n" + GET)
    assert until_closed(connection)[0] == b""


def test_requests_in_a_row_are_answered_in_their_order(connection: socket.socket) -> None:
    connection.sendall(POST + b"Content-Length: 3\r\n\r\nabc" + GET + GET.replace(b"/a", b"/b"))
    received = b""
    while received.count(b"HTTP/1.1 200") < 3 or not received.endswith(b"/b "):
        received += connection.recv(1 << 16)
    assert received.index(b"/a abc") < received.rindex(b"/a ") < received.index(b"/b ")


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
def test_whoever_asks_for_another_protocol_goes_on_without(
    connection: socket.socket, upgrade: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"Content-Length: 3\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + b"\r\n\r\nabc"
    connection.sendall(POST + head)
    receive_until(connection, b"/a abc")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"//v1/models", b"//v1/models"),
        (b"/%76%31/models", b"/v1/models"),
        (b"/v1%2fmodels", b"/v1/models"),
        (b"/health/%2e%2e/v1", b"/health/../v1"),
        (b"/%ff", "/\ufffd".encode()),
        (b"/a?b=/health", b"/a"),
        (b"http://other/health", b"http://other/health"),
    ],
)
def test_a_path_is_decoded_once_and_never_shortened(
    connection: socket.socket, target: bytes, path: bytes
) -> None:
    """What routes and the gate of keys see is the same text."""
    connection.sendall(
        b"POST " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    )
    answer, _ = until_closed(connection)
    assert answer.endswith(path + b" ") or (status_of(answer) == 404 and path.startswith(b"http"))
