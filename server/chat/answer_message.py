"""The pieces of an answer as messages of the API, whole or as deltas."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from msgspec import UNSET

from nybble.server.chat.answer_parser import Content, Piece, Reasoning
from nybble.server.chat.answer_stream import AnswerDelta
from nybble.server.chat.tool_call_parser import CallArguments, CallStart
from nybble.server.requests.schemas import (
    AssistantMessage,
    FunctionCall,
    FunctionCallDelta,
    LogprobEntry,
    MessageDelta,
    ToolCall,
    ToolCallDelta,
)


class MessageDeltas:
    """Of one answer, whose calls it numbers."""

    def __init__(self) -> None:
        self._num_calls = 0

    def of(self, piece: Piece) -> MessageDelta:
        match piece:
            case Reasoning(text):
                return MessageDelta(reasoning_content=text, reasoning=text)
            case Content(text):
                return MessageDelta(content=text)
            case CallStart(name):
                self._num_calls += 1
                function = FunctionCallDelta(name=name, arguments="")
                call = ToolCallDelta(
                    index=self._num_calls - 1, id=_call_id(), type="function", function=function
                )
            case CallArguments(text):
                call = ToolCallDelta(index=self._num_calls - 1, function=FunctionCallDelta(arguments=text))
        return MessageDelta(tool_calls=[call])


@dataclass
class AnswerMessage:
    """One answer as it grows."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, list[str]]] = field(default_factory=list)  # name, pieces of arguments
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, delta: AnswerDelta) -> None:
        for piece in delta.pieces:
            self._add_piece(piece)
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or ""

    def message(self) -> AssistantMessage:
        """With a thought or calls and nothing else, it has no content; what there is none of has no field."""
        has_other = bool(self.reasoning or self.calls)
        reasoning = self.reasoning or UNSET
        return AssistantMessage(
            content=None if has_other and not self.content else self.content,
            reasoning_content=reasoning,
            reasoning=reasoning,
            tool_calls=[_tool_call(*call) for call in self.calls] or UNSET,
        )

    def _add_piece(self, piece: Piece) -> None:
        match piece:
            case Reasoning(text):
                self.reasoning += text
            case Content(text):
                self.content += text
            case CallStart(name):
                self.calls.append((name, []))
            case CallArguments(text):
                self.calls[-1][1].append(text)


def _tool_call(name: str, arguments: list[str]) -> ToolCall:
    return ToolCall(id=_call_id(), function=FunctionCall(name, "".join(arguments)))


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex}"
