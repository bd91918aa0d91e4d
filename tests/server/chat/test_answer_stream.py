from __future__ import annotations

from collections.abc import Sequence

import pytest
from scripted_engine import scripted_logprobs

from nybble.engine.messages import TokenEvent
from nybble.engine.tokenizer import Tokenizer
from nybble.server.chat.answer_parser import AnswerParser, Content, Reasoning
from nybble.server.chat.answer_stream import AnswerDelta, AnswerStream
from nybble.server.text.text_stream import TextStream


def _deltas(
    tokenizer: Tokenizer, token_ids: Sequence[int], is_open: bool = True, stops: Sequence[str] = ()
) -> list[AnswerDelta]:
    stream = AnswerStream(TextStream(tokenizer, stops), AnswerParser(True, is_open))
    return [
        stream.feed(
            TokenEvent(
                request_id="r",
                token_id=token_id,
                logprobs=scripted_logprobs(token_id, 0),
                finish_reason="length" if place == len(token_ids) else None,
                num_cached_tokens=0,
            )
        )
        for place, token_id in enumerate(token_ids, 1)
    ]


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
    assert sum(delta.is_reasoning_token for delta in deltas) == num_reasoning


def test_a_tag_spelled_in_letters_counts_too(tokenizer: Tokenizer) -> None:
    deltas = _deltas(tokenizer, [*b"a</think>b"])
    assert [delta.pieces for delta in deltas if delta.pieces] == [(Reasoning("a"),), (Content("b"),)]
    assert sum(delta.is_reasoning_token for delta in deltas) == len("a</think>")


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
