"""From an engine's tokens to the pieces of a chat answer; streamed or not, the same pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal

from msgspec import Struct

from nybble.engine.messages import FinishReason, TokenEvent
from nybble.server.chat.answer_parser import AnswerParser, Piece, joined_pieces
from nybble.server.requests.schemas import LogprobEntry
from nybble.server.text.text_stream import TextStream

AnswerFinish = FinishReason | Literal["tool_calls"]


class AnswerDelta(Struct, frozen=True):  # one is made for each token: a dataclass takes several times as long
    """What some tokens add to an answer. Its last one carries the finish reason.

    text: as the model wrote it, tags included; logprobs: never without a piece or a finish reason;
    num_tokens: that were read; num_reasoning_tokens: of them, those of a thought.
    """

    pieces: tuple[Piece, ...]
    text: str
    logprobs: tuple[LogprobEntry, ...]
    num_reasoning_tokens: int
    finish_reason: AnswerFinish | None
    num_tokens: int = 1


class AnswerStream:
    """A text stream and the parser of its text."""

    def __init__(self, text_stream: TextStream, parser: AnswerParser) -> None:
        self._text_stream = text_stream
        self._parser = parser
        self._logprobs: tuple[LogprobEntry, ...] = ()  # of text that the parser holds back

    def feed(self, events: Sequence[TokenEvent]) -> AnswerDelta:
        """What they add together. Those after the end of the answer are not read."""
        deltas = []
        for event in events:
            deltas.append(self._feed(event))
            if deltas[-1].finish_reason is not None:
                break
        return deltas[0] if len(deltas) == 1 else _joined(deltas)

    def _feed(self, event: TokenEvent) -> AnswerDelta:
        delta = self._text_stream.feed(event)
        was_thinking = self._parser.is_thinking
        pieces = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish(is_cut=delta.finish_reason == "length")
        finish_reason = self._finish_reason(delta.finish_reason)
        return AnswerDelta(
            pieces=tuple(pieces),
            text=delta.text,
            logprobs=self._released(delta.logprobs, is_due=bool(pieces) or finish_reason is not None),
            num_reasoning_tokens=int(was_thinking or self._parser.is_thinking),
            finish_reason=finish_reason,
        )

    def _finish_reason(self, of_text: FinishReason | None) -> AnswerFinish | None:
        if self._parser.is_over or (of_text == "stop" and self._parser.has_calls):
            return "tool_calls"
        return of_text

    def _released(self, logprobs: tuple[LogprobEntry, ...], is_due: bool) -> tuple[LogprobEntry, ...]:
        held = self._logprobs + logprobs
        self._logprobs = () if is_due else held
        return held if is_due else ()


def _joined(deltas: Sequence[AnswerDelta]) -> AnswerDelta:
    return AnswerDelta(
        pieces=tuple(joined_pieces(chain.from_iterable(delta.pieces for delta in deltas))),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        num_reasoning_tokens=sum(delta.num_reasoning_tokens for delta in deltas),
        finish_reason=deltas[-1].finish_reason,
        num_tokens=len(deltas),
    )
