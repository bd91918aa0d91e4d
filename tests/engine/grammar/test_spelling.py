"""Tags in ordinary tokens, against looking for them in the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.grammar.spelling import Spelling
from nybble.engine.grammar.token_words import has

TAGS = [b"<ab>", b"</ab>", b"aa>"]  # the last overlaps itself
PIECES = [b"<", b"</", b"a", b"b>", b"ab", b">", b"a>x<", b"<ab>", b"x", b"aa>", b"", b"b"]

_texts = st.lists(st.integers(0, len(PIECES) - 1), max_size=12)


@given(token_ids=_texts)
def test_no_tag_is_ever_completed_but_by_those_tokens(token_ids: list[int]) -> None:
    pieces = dict(enumerate(PIECES))
    spelling = Spelling(TAGS, {t: piece for t, piece in pieces.items() if b">" in piece}, 1)
    tail = text = b""
    for token_id in token_ids:
        words = spelling.completing(tail)
        for other, piece in pieces.items():
            completes = any(tag in text + piece for tag in TAGS)
            assert has(words, other) is (completes and piece != b"")
        if has(words, token_id):
            return
        text = text + pieces[token_id] if pieces[token_id] else b""  # a tag: the text after it is another
        tail = spelling.tail_after(tail, [pieces[token_id]])
    assert spelling.tail_after(b"", [pieces[t] for t in token_ids]) == tail
