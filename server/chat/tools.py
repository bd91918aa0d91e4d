"""The tools of a request: checked, as the chat template takes them, and as their calls are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from nybble.engine.tokenizer import Tokenizer
from nybble.server.chat.answer_parser import CallRules
from nybble.server.chat.argument_types import ArgumentTypes
from nybble.server.chat.tool_call_parser import CALL_TAGS, NAME
from nybble.server.errors import BadRequestError
from nybble.server.requests.request_body import split_location
from nybble.server.requests.schemas import ChatCompletionRequest, Tool


@dataclass(frozen=True)
class Tools:
    """definitions: the request's objects as they came, key order included; is_parallel: whether an answer may
    have several calls."""

    definitions: Sequence[Mapping[str, Any]]
    is_parallel: bool

    def call_rules(self) -> CallRules:
        types = {
            tool["function"]["name"]: ArgumentTypes(tool["function"].get("parameters"))
            for tool in self.definitions
        }
        unknown = ArgumentTypes(None)
        return CallRules(lambda name: types.get(name, unknown), self.is_parallel)


def check_tools(request: ChatCompletionRequest) -> None:
    """Raises BadRequestError, which names the field at fault."""
    names = set[str]()
    for index, definition in enumerate(request.tools or ()):
        param = f"tools[{index}]"
        function = _converted(definition, param).function
        if not re.fullmatch(NAME, function.name):
            wanted = "1 to 256 letters, digits and _-./:@"
            raise BadRequestError(f"{param}.function.name: expected {wanted}", f"{param}.function.name")
        if function.name in names:
            raise BadRequestError(
                f"{param}.function.name: {function.name!r} occurs twice", f"{param}.function.name"
            )
        names.add(function.name)
        if function.strict:
            name = f"{param}.function.strict"
            raise BadRequestError(f"{name}: not supported by this server", name, "unsupported_parameter")


def offered_tools(request: ChatCompletionRequest, tokenizer: Tokenizer) -> Tools | None:
    """The tools that an answer may call. With tool_choice "none", the prompt does not speak of them.

    Raises:
        BadRequestError: the model has no markup for calls.
    """
    if not request.tools or request.tool_choice == "none":
        return None
    if not all(map(tokenizer.has_token, CALL_TAGS)):
        message = "tools: not supported by this model: it has no tokens for tool calls"
        raise BadRequestError(message, "tools", "unsupported_parameter")
    return Tools(request.tools, request.parallel_tool_calls is not False)


def _converted(definition: Mapping[str, Any], param: str) -> Tool:
    try:
        return msgspec.convert(definition, Tool)
    except msgspec.ValidationError as error:
        message, path = split_location(str(error))
        where = f"{param}.{path}" if path else param
        raise BadRequestError(f"{where}: {message}", where) from error
