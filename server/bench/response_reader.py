"""HTTP/1.1 responses and the server-sent events in them, read as they arrive: a load generator's end.

RFC 9112; events as https://html.spec.whatwg.org/multipage/server-sent-events.html, of which chat APIs use
single lines of data.
"""

from __future__ import annotations

import re

_HEX = re.compile(rb"[0-9a-fA-F]{1,15}")
_END_OF_HEAD = b"\r\n\r\n"
_MAX_HEAD = 1 << 16


class BadResponseError(Exception):
    """What came is not a response, or ended too early."""


class ResponseReader:
    """`status` is None until the head has come; `is_complete` once the body has."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.is_complete = False
        self._buffer = b""
        self._is_chunked = False
        self._num_left: int | None = None  # bytes of the body to come; None: until the connection ends

    def feed(self, data: bytes) -> bytes:
        """The part of the body that `data` adds. Raises BadResponseError."""
        self._buffer += data
        while self.status is None:
            if not self._read_head():
                return b""
        if self._is_chunked:
            return self._read_chunks()
        body, self._buffer = self._buffer, b""
        if self._num_left is not None:
            self._num_left -= len(body)
            self.is_complete = self._num_left <= 0
        return body

    def finish(self) -> None:
        """The connection has ended. Raises BadResponseError if the response has not."""
        has_no_length = self.status is not None and not self._is_chunked and self._num_left is None
        self.is_complete = self.is_complete or has_no_length
        if not self.is_complete:
            raise BadResponseError("the connection ended before the response did")

    def _read_head(self) -> bool:
        """Whether a whole one was there. Interim responses (1xx) leave `status` None."""
        head, end, rest = self._buffer.partition(_END_OF_HEAD)
        if not end:
            if len(head) > _MAX_HEAD:
                raise BadResponseError(f"no end of the headers in {_MAX_HEAD} bytes")
            return False
        self._buffer = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
            raise BadResponseError(f"not an HTTP/1.1 response: {first[:80]!r}")
        if (status := int(words[1])) >= 200:
            self.status = status
            self._read_headers(
                {name.lower(): text.strip() for name, _, text in (s.partition(":") for s in lines)}
            )
        return True

    def _read_headers(self, headers: dict[str, str]) -> None:
        self._is_chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        length = headers.get("content-length")
        if length is not None and not self._is_chunked:
            if not length.isdecimal():
                raise BadResponseError(f"content-length is {length!r}")
            self._num_left = int(length)
            self.is_complete = self._num_left == 0

    def _read_chunks(self) -> bytes:
        pieces, buffer, position = [], self._buffer, 0
        while not self.is_complete and (line_end := buffer.find(b"\r\n", position)) >= 0:
            digits = buffer[position:line_end].partition(b";")[0].strip()
            if not _HEX.fullmatch(digits):
                raise BadResponseError(f"a chunk's length is {digits[:40]!r}")
            start, size = line_end + 2, int(digits, 16)
            if len(buffer) < start + size + 2:
                break
            if size == 0:
                self.is_complete = True
            pieces.append(buffer[start : start + size])
            position = start + size + 2
        self._buffer = buffer[position:]
        return b"".join(pieces)


class EventReader:
    """Server-sent events: the data of each. Comments and other fields are passed over."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, body: bytes) -> list[bytes]:
        *lines, self._buffer = (self._buffer + body).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
