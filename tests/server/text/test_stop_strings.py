from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.text.stop_strings import StopStringMatcher


def _run(stops: Sequence[str], pieces: Iterable[str]) -> tuple[str, bool]:
    matcher = StopStringMatcher(stops)
    text = "".join([*map(matcher.feed, pieces), matcher.finish()])
    return text, matcher.has_matched


def _oracle(stops: Sequence[str], text: str) -> tuple[str, bool]:
    """Read character by character: the first match to be complete ends the text at its start."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@st.composite
def _pieces(draw: st.DrawFn) -> list[str]:
    text = draw(st.text("abc", max_size=24))
    cuts = draw(st.lists(st.integers(0, len(text)), max_size=8))
    return [text[start:end] for start, end in pairwise(sorted({0, len(text), *cuts}))]


_stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


@given(stops=_stops.map(lambda stops: stops[:1]), pieces=_pieces())
def test_one_stop_string_and_every_cut(stops: list[str], pieces: list[str]) -> None:
    assert _run(stops, pieces) == _oracle(stops, "".join(pieces))


@given(stops=_stops, text=st.text("abc", max_size=24))
def test_character_by_character(stops: list[str], text: str) -> None:
    assert _run(stops, text) == _oracle(stops, text)


@given(stops=_stops, pieces=_pieces())
def test_stop_strings_and_every_cut(stops: list[str], pieces: list[str]) -> None:
    assert _run(stops, pieces) == _oracle(stops, "".join(pieces))


@given(stops=_stops, pieces=_pieces())
def test_only_what_may_become_a_stop_string_is_held_back(stops: list[str], pieces: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    fed = released = ""
    for piece in pieces:
        fed += piece
        released += matcher.feed(piece)
        if matcher.has_matched:
            break
        held = fed[len(released) :]
        assert fed == released + held
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stop", "text", "wanted"),
    [
        ("aab", "aaab", "a"),
        ("aab", "aaaaab", "aaa"),
        ("abab", "aabab", "a"),
        ("abab", "ababab", ""),
        ("abab", "abaabab", "aba"),
        ("aabaaa", "aabaabaaa", "aab"),
        ("\n\n", "a\n b\n\n\nc", "a\n b"),
        ("é€", "é€", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stops_that_overlap_themselves(stop: str, text: str, wanted: str, size: int) -> None:
    pieces = [text[n : n + size] for n in range(0, len(text), size)]
    assert _run([stop], pieces) == (wanted, True)


@pytest.mark.parametrize("text", ["", "aa", "aba", "ba"])
def test_what_was_held_back_comes_out_at_the_end(text: str) -> None:
    assert _run(["aab", "abab"], text) == (text, False)


@pytest.mark.parametrize("stops", [["abc", "bc"], ["bc", "abc"]])
@pytest.mark.parametrize("pieces", [["xabc"], ["xab", "c"], ["x", "a", "b", "c"]])
def test_of_two_matches_the_earlier_start_wins(stops: list[str], pieces: list[str]) -> None:
    assert _run(stops, pieces) == ("x", True)


def test_nothing_comes_out_after_a_match() -> None:
    matcher = StopStringMatcher(["b"])
    assert [matcher.feed("abc"), matcher.feed("abc"), matcher.finish()] == ["a", "", ""]
    assert matcher.has_matched


def test_without_stop_strings_all_text_passes_at_once() -> None:
    matcher = StopStringMatcher([])
    assert matcher.feed("abc") == "abc"
    assert not matcher.has_matched


@pytest.mark.parametrize("pieces", [["abcd"], ["abc", "d"], ["a", "b", "c", "d"]])
def test_a_stop_string_inside_another(pieces: list[str]) -> None:
    matcher = StopStringMatcher(["bcd", "c"])
    assert "".join(map(matcher.feed, pieces)) == "ab"
