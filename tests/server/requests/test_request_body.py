"""The messages for each kind of fault are tested with the requests that have them (test_chat_request.py)."""

from __future__ import annotations

import msgspec
import pytest

from nybble.server.errors import BadRequestError
from nybble.server.requests.request_body import check_supported, decode_body


class _Body(msgspec.Struct):
    size: int
    shade: str | None = None


_decoder = msgspec.json.Decoder(_Body)


def test_a_body() -> None:
    assert decode_body(b'{"size": 3, "other": 1}', _decoder) == _Body(3)


@pytest.mark.parametrize("body", [b"{}", b'{"size": "x"}'])
def test_a_bad_field_is_named(body: bytes) -> None:
    with pytest.raises(BadRequestError, match=r"^size: ") as caught:
        decode_body(body, _decoder)
    assert caught.value.param == "size"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"shade": "\xff"}', "it is not UTF-8: invalid start byte (0xff)"),
        (b'{"shade": "x\\ud83d"}', "a string in it has half of a surrogate pair, which is no text"),
        (
            b'{"shade": "\\uD83D\\ude00 \\uDE00"}',
            "a string in it has half of a surrogate pair, which is no text",
        ),
        (b'{"shade": "\\ud83d\\ude00",}', "JSON is malformed: trailing comma in object (byte 25)"),
        (b"{'size': 3}", "JSON is malformed: object keys must be strings (byte 1)"),
    ],
)
def test_what_is_no_json(body: bytes, fault: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        decode_body(body, _decoder)
    assert (caught.value.message, caught.value.code) == (
        f"the request body is not JSON: {fault}",
        "invalid_json",
    )


def test_a_missing_field_is_named() -> None:
    with pytest.raises(BadRequestError, match=r"^size: a required field is missing$"):
        decode_body(b"{}", _decoder)


def test_a_field_that_is_not_supported() -> None:
    check_supported(_Body(1, "grey"), {"shade": ("grey",)})
    check_supported(_Body(1), {"shade": ()})
    with pytest.raises(BadRequestError, match=r"^shade: not supported by this server with value 'red'"):
        check_supported(_Body(1, "red"), {"shade": ("grey",)})
