from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import scripted_logprobs

from nybble.engine.messages import FinishReason, TokenEvent, TokenLogprobs
from nybble.engine.tokenizer import Tokenizer
from nybble.server.text.text_stream import Delta, TextStream


def _event(token_id: int, finish_reason: FinishReason | None = None, num_top: int | None = 2) -> TokenEvent:
    return TokenEvent(
        request_id="r",
        token_id=token_id,
        logprobs=None if num_top is None else scripted_logprobs(token_id, num_top),
        finish_reason=finish_reason,
        num_cached_tokens=0,
    )


def _deltas(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    stops: Sequence[str] = (),
    finish_reason: FinishReason = "length",
    num_top: int | None = 2,
) -> list[Delta]:
    """The deltas up to the one with a finish reason; the last token carries `finish_reason`."""
    stream = TextStream(tokenizer, stops)
    deltas: list[Delta] = []
    for number, token_id in enumerate(token_ids, 1):
        is_last = number == len(token_ids)
        deltas.append(stream.feed(_event(token_id, finish_reason if is_last else None, num_top)))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def _text(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def _entry_bytes(deltas: Sequence[Delta]) -> list[bytes]:
    return [bytes(entry.bytes) for delta in deltas for entry in delta.logprobs]


_texts = st.lists(
    st.sampled_from("ab\n é€😀") | st.sampled_from(["hello", "world", "<think>"]), min_size=1
).map("".join)


@given(text=_texts, stop=st.none() | st.sampled_from(["b", "ab", "\n\n", "é", "lo wo", "😀a", "never"]))
def test_text_and_logprobs_end_at_the_stop_string(tokenizer: Tokenizer, text: str, stop: str | None) -> None:
    token_ids = tokenizer.encode(text)
    deltas = _deltas(tokenizer, token_ids, () if stop is None else (stop,))
    wanted = text if stop is None else text.split(stop)[0]
    assert _text(deltas) == wanted
    assert deltas[-1].finish_reason == ("length" if wanted == text else "stop")
    # A token belongs to the answer if its first byte is of a character of the answer.
    kept, num_bytes = [], 0
    for token_bytes in map(tokenizer.token_bytes, token_ids):
        if num_bytes < len(wanted.encode()):
            kept.append(token_bytes)
        num_bytes += len(token_bytes)
    assert _entry_bytes(deltas) == kept


@given(text=_texts)
def test_logprobs_go_with_their_text(tokenizer: Tokenizer, text: str) -> None:
    """Never before it: a client that shows text and probabilities together has both."""
    text_bytes = entry_bytes = 0
    for delta in _deltas(tokenizer, tokenizer.encode(text), ("never", "and")):
        text_bytes += len(delta.text.encode())
        starts = []
        for entry in delta.logprobs:
            starts.append(entry_bytes)
            entry_bytes += len(entry.bytes)
        assert all(start < text_bytes for start in starts)
    assert entry_bytes == len(text.encode())


def test_a_character_over_three_tokens(tokenizer: Tokenizer) -> None:
    deltas = _deltas(tokenizer, list("€a".encode()))
    assert [delta.text for delta in deltas] == ["", "", "€", "a"]
    assert [len(delta.logprobs) for delta in deltas] == [0, 0, 3, 1]
    assert _entry_bytes(deltas) == [b"\xe2", b"\x82", b"\xac", b"a"]


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_length_ends_in_the_middle_of_a_character(tokenizer: Tokenizer, num_bytes: int) -> None:
    unfinished = "😀".encode()[:num_bytes]
    deltas = _deltas(tokenizer, [ord("a"), *unfinished])
    assert _text(deltas) == "a\ufffd"
    assert deltas[-1].finish_reason == "length"
    assert _entry_bytes(deltas) == [b"a", *(bytes([byte]) for byte in unfinished)]


def test_a_special_token_ends_in_the_middle_of_a_character(tokenizer: Tokenizer, end_id: int) -> None:
    deltas = _deltas(tokenizer, [0xE2, end_id], finish_reason="stop")
    assert (_text(deltas), deltas[-1].finish_reason) == ("\ufffd", "stop")


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_held_back_text_comes_with_the_last_token(tokenizer: Tokenizer, finish_reason: FinishReason) -> None:
    deltas = _deltas(tokenizer, list(b"xab"), ("abc",), finish_reason)
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [
        ("x", None),
        ("", None),
        ("ab", finish_reason),
    ]
    assert [len(delta.logprobs) for delta in deltas] == [1, 0, 2]


def test_a_stop_string_on_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    deltas = _deltas(tokenizer, list(b"xab"), ("ab",), "length")
    assert (_text(deltas), deltas[-1].finish_reason) == ("x", "stop")
    assert _entry_bytes(deltas) == [b"x"]


def test_a_stop_string_in_a_text_that_only_ends_with_the_request(tokenizer: Tokenizer) -> None:
    deltas = _deltas(tokenizer, [ord("a"), 0xE2], ("\ufffd",), "length")
    assert (_text(deltas), deltas[-1].finish_reason) == ("a", "stop")


def test_a_token_that_the_stop_string_cuts_keeps_its_entry(tokenizer: Tokenizer) -> None:
    deltas = _deltas(tokenizer, tokenizer.encode("helloworld"), ("loworl",))
    assert _text(deltas) == "hel"
    assert _entry_bytes(deltas) == [b"hello"]


def test_special_tokens_have_neither_text_nor_entries(tokenizer: Tokenizer, end_id: int) -> None:
    deltas = _deltas(tokenizer, [ord("a"), end_id, ord("b"), end_id], finish_reason="stop")
    assert [delta.text for delta in deltas] == ["a", "", "b", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "stop"]
    assert _entry_bytes(deltas) == [b"a", b"b"]


def test_no_logprobs_unless_the_engine_gives_them(tokenizer: Tokenizer) -> None:
    assert _entry_bytes(_deltas(tokenizer, list(b"abc"), num_top=None)) == []


def test_the_fields_of_an_entry(tokenizer: Tokenizer, end_id: int) -> None:
    logprobs = TokenLogprobs(logprob=-0.25, top=((0xE2, -0.125), (ord("a"), -0.25), (end_id, -math.inf)))
    event = TokenEvent(
        request_id="r", token_id=ord("a"), logprobs=logprobs, finish_reason="length", num_cached_tokens=0
    )
    (entry,) = TextStream(tokenizer, ()).feed(event).logprobs
    assert (entry.token, entry.logprob, entry.bytes) == ("a", -0.25, [97])
    assert [(top.token, top.logprob, bytes(top.bytes)) for top in entry.top_logprobs] == [
        ("\ufffd", -0.125, b"\xe2"),
        ("a", -0.25, b"a"),
        ("<|end|>", -9999.0, b"<|end|>"),
    ]


@pytest.mark.parametrize(("stop", "last"), [("a", "stop"), ("ab", None)])
def test_no_entry_beyond_the_stop_after_an_unfinished_character(
    tokenizer: Tokenizer, stop: str, last: str | None
) -> None:
    stream = TextStream(tokenizer, (stop,))
    deltas = [
        stream.feed(
            TokenEvent(
                request_id="r",
                token_id=token_id,
                logprobs=scripted_logprobs(token_id, 0),
                finish_reason=None,
                num_cached_tokens=0,
            )
        )
        for token_id in (0xE2, ord("a"))
    ]
    assert (deltas[1].text, deltas[1].finish_reason) == ("\ufffd", last)
    assert [bytes(entry.bytes) for entry in deltas[1].logprobs] == [b"\xe2"]


def test_tokens_together_are_what_they_are_one_by_one(tokenizer: Tokenizer) -> None:
    token_ids = [*"é<stop>".encode()]
    events = [_event(token_id, None, 1) for token_id in token_ids]
    one_by_one = TextStream(tokenizer, ["op"])
    deltas = [one_by_one.feed(event) for event in events[:-1]]
    delta = TextStream(tokenizer, ["op"]).feed_all(events)
    assert (delta.text, delta.finish_reason, delta.num_tokens) == ("é<st", "stop", len(deltas))
    assert delta.text == "".join(each.text for each in deltas)
    assert delta.logprobs == tuple(entry for each in deltas for entry in each.logprobs)
    assert deltas[-1].finish_reason == "stop"
