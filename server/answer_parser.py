"""Tells a model's thought from its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nybble.server.tag_splitter import TagSplitter

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


Piece = Reasoning | Content


class AnswerParser:
    """From text to pieces of an answer, which are the same however the text is cut.

    A thought is at the start: the prompt has opened it, or the text does after nothing but white space.
    It ends at its end tag. A tag that says again what has just been said is dropped, any other is text.

    White space around a thought is dropped, as chat templates drop it when the turn comes back.
    """

    def __init__(self, has_thinking: bool, is_open: bool) -> None:
        """has_thinking: whether the model has tags for thoughts; is_open: whether the prompt ends in one."""
        self._splitter = TagSplitter((THINK, END_THINK) if has_thinking else ())
        self._state: Literal["start", "thought", "answer"] = "thought" if is_open else "start"
        self._is_at_start = True  # of the thought or answer: nothing but white space yet
        self._space = ""  # held back: it may be an edge
        if not has_thinking:
            self._state = "answer"
            self._is_at_start = False

    @property
    def is_thinking(self) -> bool:
        return self._state == "thought"

    def feed(self, text: str) -> list[Piece]:
        return _joined(piece for part in self._splitter.feed(text) for piece in self._take(part))

    def finish(self) -> list[Piece]:
        """The text ended."""
        pieces = [piece for part in self._splitter.finish() for piece in self._take(part)]
        if self._state == "start" and self._space:
            pieces.append(Content(self._space))
        return _joined(pieces)

    def _take(self, part: str) -> Iterator[Piece]:
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
            case _:
                yield from map(Content, self._after_edge(part))

    def _enter(self, state: Literal["thought", "answer"]) -> None:
        self._state = state
        self._is_at_start = True
        self._space = ""

    def _first_content(self, part: str) -> Iterator[Content]:
        """Without a thought before it, an answer keeps the white space that it starts with."""
        self._space += part
        if not self._space.isspace():
            self._state = "answer"
            self._is_at_start = False
            yield Content(self._space)

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


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours of one kind as one."""
    joined: list[Piece] = []
    for piece in pieces:
        match joined, piece:
            case [*_, Reasoning(before)], Reasoning(text):
                joined[-1] = Reasoning(before + text)
            case [*_, Content(before)], Content(text):
                joined[-1] = Content(before + text)
            case _:
                joined.append(piece)
    return joined
