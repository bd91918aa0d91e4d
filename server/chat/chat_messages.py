"""The messages of a request as chat templates take them.

Templates take text and objects only: no null, no parts, no arguments as a string, and no role developer.
Results of tools have no names there: their order tells which call each answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nybble.server.chat.thinking import past_thought
from nybble.server.errors import BadRequestError
from nybble.server.requests.schemas import ChatMessage, PastToolCall, TextPart

TemplateMessage = dict[str, Any]


def template_messages(messages: Sequence[ChatMessage]) -> list[TemplateMessage]:
    """Raises BadRequestError, which names the field at fault."""
    plain = [_plain_message(index, message) for index, message in enumerate(messages)]
    return [plain[index] for index in _in_order_of_calls(messages)]


def _in_order_of_calls(messages: Sequence[ChatMessage]) -> list[int]:
    """Indices of the messages, with the results that follow a turn in the order of its calls."""
    keys, places = list[tuple[int, int]](), dict[str, int]()
    turn = 0  # the last message that is no result
    for index, message in enumerate(messages):
        if message.role == "tool":
            keys.append((turn, places.get(message.tool_call_id or "", len(places))))
        else:
            turn, places = index, _places(message)
            keys.append((turn, -1))
    return sorted(range(len(messages)), key=keys.__getitem__)  # stable: unknown ones stay in their order


def _places(message: ChatMessage) -> dict[str, int]:
    """Of each call's id, which call it is."""
    return {call.id: place for place, call in enumerate(message.tool_calls or ()) if call.id}


def _plain_message(index: int, message: ChatMessage) -> TemplateMessage:
    role = "system" if message.role == "developer" else message.role
    plain: TemplateMessage = {"role": role, "content": _text(index, message)}
    if role == "assistant":
        thought = past_thought(index, message)
        if thought is not None:
            plain["reasoning_content"] = thought
        if message.tool_calls:
            plain["tool_calls"] = [_plain_call(index, *each) for each in enumerate(message.tool_calls)]
    elif message.tool_calls:
        param = f"messages[{index}].tool_calls"
        raise BadRequestError(f"{param}: only an assistant's message can have them", param)
    return plain


def _plain_call(index: int, number: int, call: PastToolCall) -> dict[str, Any]:
    param = f"messages[{index}].tool_calls[{number}].function.arguments"
    function = {"name": call.function.name, "arguments": _arguments(call.function.arguments, param)}
    return {"type": "function", "function": function}


def _arguments(given: str | dict[str, Any], param: str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        arguments = json.loads(given.strip() or "{}")
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"{param}: not JSON: {error}", param) from error
    if not isinstance(arguments, dict):
        raise BadRequestError(f"{param}: expected a JSON object", param)
    return arguments


def _text(index: int, message: ChatMessage) -> str:
    content = message.content
    if content is None:
        if message.role not in ("assistant", "tool"):
            param = f"messages[{index}].content"
            raise BadRequestError(f"{param}: missing for role {message.role!r}", param)
        return ""
    if isinstance(content, str):
        return content
    return "".join(_part_text(index, n, part) for n, part in enumerate(content))


def _part_text(index: int, number: int, part: TextPart) -> str:
    param = f"messages[{index}].content[{number}]"
    if part.type != "text":
        raise BadRequestError(f"{param}: type {part.type!r} is not supported, only 'text'", param)
    if part.text is None:
        raise BadRequestError(f"{param}.text: missing", f"{param}.text")
    return part.text
