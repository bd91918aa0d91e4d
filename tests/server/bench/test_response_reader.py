from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.bench.response_reader import BadResponseError, EventReader, ResponseReader

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nab\r\n\r\nA;x\r\n0123456789\r\n0\r\n\r\n"
)
SIZED = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\nhello"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED


def _read(pieces: list[bytes]) -> tuple[ResponseReader, bytes]:
    reader = ResponseReader()
    return reader, b"".join(reader.feed(piece) for piece in pieces)


@given(st.lists(st.integers(0, len(CHUNKED)), max_size=6), st.sampled_from([CHUNKED, SIZED, INTERIM]))
def test_the_same_however_it_arrives(cuts: list[int], data: bytes) -> None:
    edges = [0, *sorted(cuts), len(data)]
    reader, body = _read([data[a:b] for a, b in pairwise(edges)])
    assert (reader.status, body) == ((200, b"ab\r\n0123456789") if data == CHUNKED else (404, b"hello"))
    assert reader.is_complete
    reader.finish()


def test_a_body_that_ends_with_the_connection() -> None:
    reader, body = _read([b"HTTP/1.0 200 OK\r\n\r\n", b"some"])
    assert body == b"some" and not reader.is_complete
    reader.finish()
    assert reader.is_complete


@pytest.mark.parametrize("data", [CHUNKED[:-6], SIZED[:-1], SIZED[:20], b""])
def test_a_response_that_breaks_off(data: bytes) -> None:
    reader, _ = _read([data])
    with pytest.raises(BadResponseError, match="before the response did"):
        reader.finish()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-x\r\n\r\n", "not an HTTP/1.1 response: 'SSH-2.0-x'"),
        (b"HTTP/1.1 two\r\n\r\n", "not an HTTP/1.1 response"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", "content-length is '-1'"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\n", "a chunk's length is b'-5'"),
        (b"x" * 70_000, "no end of the headers"),
    ],
)
def test_what_is_no_response(data: bytes, message: str) -> None:
    with pytest.raises(BadResponseError, match=message):
        ResponseReader().feed(data)


@given(st.lists(st.integers(0, 60), max_size=5))
def test_events_however_they_arrive(cuts: list[int]) -> None:
    data = b": note\n\ndata: one\r\n\r\nevent: x\ndata:two\n\ndata: [DONE]\n\n"
    reader, edges = EventReader(), [0, *sorted(cuts), len(data)]
    found = [event for a, b in pairwise(edges) for event in reader.feed(data[a:b])]
    assert found == [b"one", b"two", b"[DONE]"]
