from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.tokenizer import Tokenizer
from nybble.server.text.detokenizer import Detokenizer


class _Pieces:
    """A tokenizer whose token n is the n-th piece."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def is_special(self, token_id: int) -> bool:
        return False


def _outputs(pieces: Sequence[bytes]) -> list[str]:
    """What each piece gives, and then what finishing gives."""
    detokenizer = Detokenizer(cast(Tokenizer, _Pieces(pieces)))
    return [*("".join(detokenizer.feed(n)) for n in range(len(pieces))), detokenizer.finish()]


@st.composite
def _split(draw: st.DrawFn, wholes: st.SearchStrategy[bytes]) -> list[bytes]:
    whole = draw(wholes)
    cuts = draw(st.lists(st.integers(0, len(whole)), max_size=8))
    return [whole[start:end] for start, end in pairwise(sorted({0, len(whole), *cuts}))]


@given(pieces=_split(st.text().map(str.encode)))
def test_every_split_of_a_text(pieces: list[bytes]) -> None:
    assert "".join(_outputs(pieces)) == b"".join(pieces).decode()


# Continuation bytes, every kind of first byte, bytes that never occur: malformed text is likely.
_malformed = st.lists(st.sampled_from(b"a\x80\xbf\xc0\xc3\xe0\xe2\x82\xac\xed\xa0\xf0\x9f\x98\xf4\x90\xff"))


@given(pieces=_split(_malformed.map(bytes)))
def test_every_split_of_malformed_bytes(pieces: list[bytes]) -> None:
    assert "".join(_outputs(pieces)) == b"".join(pieces).decode("utf-8", "replace")


@given(text=st.text(alphabet="aé€😀", min_size=1))
def test_characters_come_out_whole_and_at_once(text: str) -> None:
    outputs = _outputs([bytes([byte]) for byte in text.encode()])
    wanted = [part for c in text for part in (*[""] * (len(c.encode()) - 1), c)]
    assert outputs == [*wanted, ""]


@pytest.mark.parametrize("unfinished", [b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98"])
def test_an_unfinished_character_at_the_end(unfinished: bytes) -> None:
    assert _outputs([b"a", unfinished]) == ["a", "", "\ufffd"]


def test_an_unfinished_character_before_text() -> None:
    assert _outputs([b"\xe2\x82", b"a"]) == ["", "\ufffda", ""]


def test_special_tokens_are_not_text(tokenizer: Tokenizer, end_id: int) -> None:
    detokenizer = Detokenizer(tokenizer)
    euro = "€".encode()
    fed = [euro[0], end_id, euro[1], euro[2], end_id]
    assert ["".join(detokenizer.feed(token_id)) for token_id in fed] == ["", "", "", "€", ""]


def test_added_tokens_that_are_not_special_are_text(tokenizer: Tokenizer) -> None:
    (token_id,) = tokenizer.encode("<think>")
    assert Detokenizer(tokenizer).feed(token_id) == ("", "<think>")
