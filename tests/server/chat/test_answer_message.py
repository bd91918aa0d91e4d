from __future__ import annotations

from msgspec import UNSET

from nybble.server.chat.answer_message import AnswerMessage, MessageDeltas
from nybble.server.chat.answer_parser import Content, Piece, Reasoning
from nybble.server.chat.answer_stream import AnswerDelta
from nybble.server.chat.tool_call_parser import CallArguments, CallStart

PIECES: list[Piece] = [
    *(
        Reasoning("R"),
        Reasoning("r"),
        Content("A"),
        CallStart("f"),
        CallArguments('{"x": '),
        CallArguments("1}"),
    ),
    *(CallStart("f"), CallArguments("{}"), Content("B")),
]


def _message(*pieces: Piece) -> AnswerMessage:
    answer = AnswerMessage()
    for piece in pieces:
        answer.add(AnswerDelta((piece,), "", (), False, None))
    return answer


def test_the_whole_message() -> None:
    message = _message(*PIECES).message()
    assert (message.reasoning_content, message.reasoning, message.content) == ("Rr", "Rr", "AB")
    assert message.tool_calls is not UNSET
    calls = [(call.type, call.function.name, call.function.arguments) for call in message.tool_calls]
    assert calls == [("function", "f", '{"x": 1}'), ("function", "f", "{}")]
    ids = {call.id for call in message.tool_calls}
    assert len(ids) == 2 and all(call_id.startswith("call_") for call_id in ids)


def test_content_is_null_only_beside_something_else() -> None:
    assert _message().message().content == ""
    assert _message(Reasoning("R")).message().content is None
    assert _message(CallStart("f"), CallArguments("{}")).message().content is None


def test_deltas_number_their_calls() -> None:
    deltas = MessageDeltas()
    calls = [delta.tool_calls[0] for delta in map(deltas.of, PIECES) if delta.tool_calls is not UNSET]
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [
        (0, "f", ""),
        (0, UNSET, '{"x": '),
        (0, UNSET, "1}"),
        (1, "f", ""),
        (1, UNSET, "{}"),
    ]
    assert [call.type for call in calls] == ["function", UNSET, UNSET, "function", UNSET]
    assert len({call.id for call in calls if call.id is not UNSET}) == 2
