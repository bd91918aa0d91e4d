from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import scripted_logprobs

from nybble.engine.messages import TokenEvent
from nybble.engine.tokenizer import Tokenizer
from nybble.server.chat.answer_parser import AnswerParser, Content, Piece, Reasoning
from nybble.server.chat.answer_stream import AnswerDelta, AnswerStream
from nybble.server.text.text_stream import TextStream


def _stream(tokenizer: Tokenizer, is_open: bool = True, stops: Sequence[str] = ()) -> AnswerStream:
    return AnswerStream(TextStream(tokenizer, stops), AnswerParser(True, is_open))


def _events(token_ids: Sequence[int]) -> list[TokenEvent]:
    return [
        TokenEvent(
            request_id="r",
            token_id=token_id,
            logprobs=scripted_logprobs(token_id, 0),
            finish_reason="length" if place == len(token_ids) else None,
            num_cached_tokens=0,
        )
        for place, token_id in enumerate(token_ids, 1)
    ]


def _deltas(
    tokenizer: Tokenizer, token_ids: Sequence[int], is_open: bool = True, stops: Sequence[str] = ()
) -> list[AnswerDelta]:
    stream = _stream(tokenizer, is_open, stops)
    return [stream.feed([event]) for event in _events(token_ids)]


@pytest.mark.parametrize(
    ("text", "is_open", "num_reasoning"),
    [
        ("ab</think>c", True, 3),
        ("<think>ab</think>c", False, 4),
        ("\n<think>ab", False, 3),
        ("</think>c", True, 1),
        ("abc", True, 3),
        ("abc", False, 0),
    ],
)
def test_tokens_of_thoughts_are_counted_with_their_tags(
    tokenizer: Tokenizer, text: str, is_open: bool, num_reasoning: int
) -> None:
    deltas = _deltas(tokenizer, tokenizer.encode(text), is_open)
    assert sum(delta.num_reasoning_tokens for delta in deltas) == num_reasoning


def test_a_tag_spelled_in_letters_counts_too(tokenizer: Tokenizer) -> None:
    deltas = _deltas(tokenizer, [*b"a</think>b"])
    assert [delta.pieces for delta in deltas if delta.pieces] == [(Reasoning("a"),), (Content("b"),)]
    assert sum(delta.num_reasoning_tokens for delta in deltas) == len("a</think>")


def test_logprobs_wait_for_a_piece(tokenizer: Tokenizer) -> None:
    deltas = _deltas(tokenizer, tokenizer.encode("\na \n</think>\nb "))
    assert [delta.pieces for delta in deltas] == [
        *((), (Reasoning("a"),), (), (), (), ()),
        *((Content("b"),), (Content(" "),)),
    ]
    entries = [b"".join(bytes(entry.bytes) for entry in delta.logprobs) for delta in deltas]
    assert entries == [b"", b"\na", b"", b"", b"", b"", b" \n</think>\nb", b" "]


def test_logprobs_that_no_piece_follows_come_at_the_end(tokenizer: Tokenizer) -> None:
    *_, last = _deltas(tokenizer, tokenizer.encode("a</think>\n"))
    assert (last.pieces, last.finish_reason, len(last.logprobs)) == ((), "length", 2)


def test_a_stop_string_ends_a_thought_too(tokenizer: Tokenizer) -> None:
    deltas = _deltas(tokenizer, tokenizer.encode("ab!c"), stops=("!",))
    assert [delta.pieces for delta in deltas[:3]] == [(Reasoning("a"),), (Reasoning("b"),), ()]
    assert deltas[2].finish_reason == "stop"


@given(st.data())
def test_tokens_together_are_what_they_are_one_by_one(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(
        st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "é", "<", "stop"])).map("".join)
    )
    events = _events([*text.encode(), *b"."])
    first = data.draw(st.integers(1, len(events)))
    one_by_one, together = _stream(tokenizer, False, ["st"]), _stream(tokenizer, False, ["st"])
    deltas = []
    for event in events[:first]:
        deltas.append(one_by_one.feed([event]))
        if deltas[-1].finish_reason is not None:
            break
    delta = together.feed(events[:first])
    assert delta.num_tokens == len(deltas)
    assert delta.text == "".join(each.text for each in deltas)
    assert delta.num_reasoning_tokens == sum(each.num_reasoning_tokens for each in deltas)
    assert delta.logprobs == tuple(entry for each in deltas for entry in each.logprobs)
    assert delta.finish_reason == deltas[-1].finish_reason
    assert _texts(delta.pieces) == _texts(piece for each in deltas for piece in each.pieces)
    if delta.finish_reason is None:  # and both go on alike
        assert one_by_one.feed(events[first:]) == together.feed(events[first:])


def _texts(pieces: Iterable[Piece]) -> list[str]:
    """Of thought and answer."""
    pieces = [*pieces]
    return [
        "".join(piece.text for piece in pieces if isinstance(piece, kind)) for kind in (Reasoning, Content)
    ]
