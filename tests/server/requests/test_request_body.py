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


def test_a_field_that_is_not_supported() -> None:
    check_supported(_Body(1, "grey"), {"shade": ("grey",)})
    check_supported(_Body(1), {"shade": ()})
    with pytest.raises(BadRequestError, match=r"^shade: not supported by this server with value 'red'"):
        check_supported(_Body(1, "red"), {"shade": ("grey",)})
