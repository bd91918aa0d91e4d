"""Texts of each format, read by the standard library."""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections.abc import Callable
from datetime import date, datetime, time
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.server.grammars.text_formats import FORMATS


def _is_host(text: str) -> bool:
    return text.isascii() and all(
        re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", part) for part in text.split(".")
    )


def _is_address(text: str) -> bool:
    local, _, host = text.partition("@")
    return _is_host(host) and re.fullmatch(r"[^\s.@]+(\.[^\s.@]+)*", local) is not None


def _is_duration(text: str) -> bool:
    pattern = r"P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)"
    return re.fullmatch(pattern, text) is not None


_READERS: dict[str, Callable[[str], object]] = {
    "date": date.fromisoformat,
    "date-time": datetime.fromisoformat,
    "time": time.fromisoformat,
    "duration": _is_duration,
    "email": _is_address,
    "hostname": _is_host,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uri": lambda text: urlsplit(text).scheme,
    "uuid": uuid.UUID,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_text_is_of_the_format(name: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.from_regex(re.compile(FORMATS[name], re.ASCII), fullmatch=True))
    def check(text: str) -> None:
        assert _READERS[name](text) is not False

    check()


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31"]),
        ("date-time", ["2024-02-29T23:59:59Z", "2024-01-01T00:00:00.5+02:00"]),
        ("duration", ["P1Y2M3DT4H5M6S", "PT1M", "P3W"]),
        ("email", ["ann.b+c@example.com"]),
        ("hostname", ["localhost", "a-b.example.com"]),
        ("ipv4", ["0.0.0.0", "255.249.100.9"]),
        ("ipv6", ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "fe80::1:2", "1:2:3:4:5:6::"]),
        ("uri", ["https://example.com:80/a/b?c=d/e#f", "mailto:a@b.c", "urn:x:y"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"]),
    ],
)
def test_common_texts_are_of_it(name: str, texts: list[str]) -> None:
    assert [text for text in texts if not re.fullmatch(FORMATS[name], text)] == []


@pytest.mark.parametrize(
    ("name", "text"), [("date", "2023-02-29"), ("date", "1900-02-29"), ("ipv4", "256.1.1.1"), ("ipv6", "1:2")]
)
def test_what_is_not_of_it(name: str, text: str) -> None:
    assert not re.fullmatch(FORMATS[name], text)
