"""The messages of a request as chat templates take them.

Templates take text and objects only: no null, no parts, no arguments as a string, and no role developer.
Arguments that are no JSON object, as a model writes them now and then and as a length limit cuts them, come
back with their turns: a template that takes a text gets it, any other an object that holds it.
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

_UNREAD = "arguments"  # the name under which a text stands that is no object


def template_messages(
    messages: Sequence[ChatMessage], takes_argument_text: bool = False
) -> list[TemplateMessage]:
    """takes_argument_text: whether the template does. Raises BadRequestError, which names the field."""
    plain = [_plain_message(index, message, takes_argument_text) for index, message in enumerate(messages)]
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


def _plain_message(index: int, message: ChatMessage, takes_argument_text: bool) -> TemplateMessage:
    role = "system" if message.role == "developer" else message.role
    plain: TemplateMessage = {"role": role, "content": _text(index, message)}
    if role == "assistant":
        thought = past_thought(index, message)
        if thought is not None:
            plain["reasoning_content"] = thought
        if message.tool_calls:
            plain["tool_calls"] = [_plain_call(call, takes_argument_text) for call in message.tool_calls]
    elif message.tool_calls:
        param = f"messages[{index}].tool_calls"
        raise BadRequestError(f"{param}: only an assistant's message can have them", param)
    return plain


def _plain_call(call: PastToolCall, takes_argument_text: bool) -> dict[str, Any]:
    arguments = _arguments(call.function.arguments)
    if isinstance(arguments, str) and not takes_argument_text:
        arguments = {_UNREAD: arguments}
    return {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _arguments(given: str | dict[str, Any]) -> dict[str, Any] | str:
    """As an object, or as they are if they are none."""
    if isinstance(given, dict):
        return given
    try:
        arguments = json.loads(given.strip() or "{}")
    except (ValueError, RecursionError):
        return given
    return arguments if isinstance(arguments, dict) else given


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
