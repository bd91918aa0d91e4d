from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.chat.tag_splitter import TagSplitter

TAGS = ("<think>", "</think>", "<tool_call>")
_texts = st.lists(st.sampled_from([*TAGS, *"<>/tk \né", "<th", "</thin"])).map("".join)


def _merged(parts: list[str]) -> list[str]:
    """Neighbouring texts as one."""
    merged: list[str] = []
    for part in parts:
        if merged and part not in TAGS and merged[-1] not in TAGS:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


@given(text=_texts, cuts=st.lists(st.integers(0, 40)))
def test_the_same_parts_however_it_is_cut(text: str, cuts: list[int]) -> None:
    splitter = TagSplitter(TAGS)
    places = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    parts: list[str] = []
    for start, end in pairwise(places):
        parts += splitter.feed(text[start:end])
    parts += splitter.finish()
    wanted = [part for part in re.split("(<think>|</think>|<tool_call>)", text) if part]
    assert _merged(parts) == wanted


@pytest.mark.parametrize(
    ("text", "certain"),
    [("a<", "a"), ("a<t", "a"), ("a<tx", "a<tx"), ("a<b<", "a<b"), ("a</", "a"), ("a>", "a>"), ("<<", "<")],
)
def test_only_what_may_become_a_tag_is_held_back(text: str, certain: str) -> None:
    assert "".join(TagSplitter(TAGS).feed(text)) == certain


def test_without_tags_nothing_is_held_back() -> None:
    splitter = TagSplitter(())
    assert (splitter.feed("a<"), splitter.feed(""), splitter.finish()) == (["a<"], [], [])
