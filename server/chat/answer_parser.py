"""Tells a model's thought from its answer, and both from its tool calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from msgspec import Struct

from nybble.server.chat.argument_types import ArgumentTypes
from nybble.server.chat.tag_splitter import TagSplitter
from nybble.server.chat.tool_call_parser import (
    CALL,
    CALL_TAGS,
    CallArguments,
    CallPiece,
    CallStart,
    Stray,
    ToolCallParser,
)

THINK, END_THINK = "<think>", "</think>"


# These are made for each token: dataclasses take several times as long.
class Reasoning(Struct, frozen=True):
    text: str


class Content(Struct, frozen=True):
    text: str


Piece = Reasoning | Content | CallStart | CallArguments


@dataclass(frozen=True)
class CallRules:
    """How an answer may call tools."""

    types_of_tool: Callable[[str], ArgumentTypes]
    is_parallel: bool = True  # else the answer is over after one call


class AnswerParser:
    """From text to pieces of an answer, which are the same however the text is cut.

    A thought is at the start: the prompt has opened it, or the text does after nothing but white space.
    It ends at its end tag. A tag that says again what has just been said is dropped, any other is text.

    White space around a thought is dropped, as chat templates drop it when the turn comes back; so is white
    space around calls. A call ends a thought. What is no call is text, and text within a call content.
    """

    def __init__(self, has_thinking: bool, is_open: bool, calls: CallRules | None = None) -> None:
        """has_thinking: whether the model has tags for thoughts; is_open: whether the prompt ends in one."""
        tags = (THINK, END_THINK) if has_thinking else ()
        self._splitter = TagSplitter((*tags, *(CALL_TAGS if calls else ())))
        self._calls = calls
        self._call: ToolCallParser | None = None  # the one that is open
        self._state: Literal["start", "thought", "answer"] = "thought" if is_open else "start"
        self._is_at_start = True  # of the thought or answer: nothing but white space yet
        self._space = ""  # held back: it may be an edge
        self.has_calls = False
        self.is_over = False  # nothing more is read
        if not has_thinking:
            self._state = "answer"
            self._is_at_start = False

    @property
    def is_thinking(self) -> bool:
        return self._state == "thought"

    def feed(self, text: str) -> list[Piece]:
        return joined_pieces(self._take_all(self._splitter.feed(text)))

    def finish(self, is_cut: bool = False) -> list[Piece]:
        """The text ended; is_cut: not by the model."""
        pieces = list(self._take_all(self._splitter.finish()))
        if self._call is not None:
            pieces += self._end_call(self._call, is_cut)
        if self._state != "thought" and self._space and not self.is_over:
            pieces.append(Content(self._space))
        return joined_pieces(pieces)

    def _take_all(self, parts: Iterable[str]) -> Iterator[Piece]:
        for part in parts:
            if not self.is_over:
                yield from self._take(part)

    def _take(self, part: str) -> Iterator[Piece]:
        if self._call is not None and self._call.accepts(part):
            yield from self._routed(self._call, self._call.take(part))
            return
        if self._call is not None:
            yield from self._end_call(self._call, is_cut=False)
            if self.is_over:
                return
        if part == CALL and self._calls is not None:
            self._call = ToolCallParser(self._calls.types_of_tool)
        else:
            yield from self._take_text(part)

    def _routed(self, call: ToolCallParser, pieces: Iterable[CallPiece]) -> Iterator[Piece]:
        """What a call gives, and what becomes of the answer by it."""
        for piece in pieces:
            if isinstance(piece, CallStart):
                self._enter("answer")
                self.has_calls = True
            if isinstance(piece, Stray):
                self._is_at_start = False
                yield Content(piece.text)
            else:
                yield piece
        if call.rejected is not None:
            self._call = None
            yield from self._take_text(call.rejected)
        elif call.is_over:
            self._call = None
            self._is_at_start = True
            self.is_over = self._calls is not None and not self._calls.is_parallel

    def _end_call(self, call: ToolCallParser, is_cut: bool) -> Iterator[Piece]:
        yield from self._routed(call, call.finish(is_cut))
        self._call = None

    def _take_text(self, part: str) -> Iterator[Piece]:
        match self._state, part:
            case ("start", "<think>"):
                self._enter("thought")
            case ("thought" | "start", "</think>"):
                self._enter("answer")
            case ("thought", "<think>") | ("answer", "</think>") if self._is_at_start:
                pass
            case ("thought", _):
                yield from map(Reasoning, self._within_edges(part))
            case ("start", _):
                yield from self._first_content(part)
            case _ if self._calls is not None:
                yield from map(Content, self._within_edges(part))
            case _:
                yield from map(Content, self._after_edge(part))

    def _enter(self, state: Literal["thought", "answer"]) -> None:
        self._state = state
        self._is_at_start = True
        self._space = ""

    def _first_content(self, part: str) -> Iterator[Content]:
        """Without a thought before it, an answer keeps the white space that it starts with."""
        text = self._space + part
        kept = text.rstrip() if self._calls is not None else text
        if text.isspace():
            self._space = text
            return
        self._state = "answer"
        self._is_at_start = False
        self._space = text[len(kept) :]
        yield Content(kept)

    def _after_edge(self, part: str) -> Iterator[str]:
        if self._is_at_start:
            part = part.lstrip()
        if part:
            self._is_at_start = False
            yield part

    def _within_edges(self, part: str) -> Iterator[str]:
        """Without white space at the start; that at the end waits until it is known to be none."""
        for text in self._after_edge(part):
            text = self._space + text
            kept = text.rstrip()
            self._space = text[len(kept) :]
            if kept:
                yield kept


def joined_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours of one kind as one; every call begins anew."""
    joined: list[Piece] = []
    for kind, group in groupby(pieces, type):
        if kind is CallStart:
            joined += group
        else:
            joined.append(kind("".join(_text(piece) for piece in group)))
    return joined


def _text(piece: Piece) -> str:
    return "" if isinstance(piece, CallStart) else piece.text
