"""Patterns that may match anywhere, as expressions of the whole text, against Python's search."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.server.grammars.lark_text import InexpressibleError
from nybble.server.grammars.text_pattern import of_whole_text

PATTERNS = [
    *("", "a", "^a", "a$", "^a$", "^$", "$", "^", "a|^b$", "^(a|b)+$", "[ab^$|]c", r"\^a", r"a\$", "^a|b|c$"),
    *(
        "(?:a|b)c",
        "(?P<n>a)b",
        r"\d",
        r"^\w+$",
        r"\W",
        r"[\d-]b",
        r"^[^a]$",
        "a.c",
        r"\/",
        "/",
        "a{2,3}$",
        "[]a]",
    ),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_texts_are_those_that_are_found(pattern: str) -> None:
    whole = re.compile(of_whole_text(pattern).replace(r"\x{2028}\x{2029}", "\u2028\u2029"))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.text(alphabet="abc^$|1-_/\n ]", max_size=5))
    def check(text: str) -> None:
        if text.endswith("\n") and "$" in pattern:
            return  # Python's $ is before a last line end, too
        assert bool(whole.fullmatch(text)) is bool(re.search(pattern, text))

    check()


@pytest.mark.parametrize(
    "pattern", ["(?=a)b", "a(?!b)", "(?<=a)b", r"\bx", r"(a)\1", "(^a|b)", "(a$)", "a^b", "a$b"]
)
def test_what_cannot_be_expressed(pattern: str) -> None:
    with pytest.raises(InexpressibleError, match="cannot be expressed"):
        of_whole_text(pattern)


def test_a_point_is_any_character_but_a_line_end() -> None:
    assert of_whole_text("^.$") == r"(?:[^\n\r\x{2028}\x{2029}])"
    assert of_whole_text(r"^\.$") == r"(?:\.)"
