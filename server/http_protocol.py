"""HTTP/1.1 on a connection: uvicorn's h11, with time limits and errors of our own.

h11 and not httptools, which takes a POST with `Upgrade: h2c`, as Java's client sends, for one without a body,
and heads of any size. h11 refuses two different lengths, unknown transfer encodings, spaces before colons and
control characters in heads, and heads over 64 KiB. What it reads although a proxy may read it otherwise, a
request with both a length and a transfer encoding, `http_checks.py` refuses.
"""

from __future__ import annotations

import asyncio

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from nybble.server.errors import BadRequestError

_BAD_REQUEST = BadRequestError("this is not an HTTP/1.1 request", code="invalid_http")


class HTTPProtocol(H11Protocol):
    """Closes a connection on which the head of a request is not whole within `head_timeout` seconds.

    The time runs from the connection's begin, and from the first byte after an answer, be it of a body that
    nobody wanted.
    """

    head_timeout = 60.0

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Nothing, where an answer has been given already."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [("content-type", "application/json"), ("connection", "close")]
            body = msgspec.json.encode(_BAD_REQUEST.body())
            response = h11.Response(status_code=400, headers=headers, reason="Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: a client may ask, and goes on without."""

    def _time_head(self) -> None:
        is_awaited = self.cycle is None or self.cycle.response_complete
        if not is_awaited:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def http_protocol(timeout: float) -> type[asyncio.Protocol]:
    """The protocol with `timeout` seconds for a head, as a class, which is what uvicorn takes."""
    return type("HTTPProtocol", (HTTPProtocol,), {"head_timeout": timeout})
