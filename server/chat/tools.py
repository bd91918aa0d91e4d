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
from nybble.server.requests.schemas import (
    AllowedTools,
    ChatCompletionRequest,
    NamedTool,
    Tool,
    ToolChoice,
)


@dataclass(frozen=True)
class OfferedTool:
    """parameters: a JSON schema, None for no arguments; place: the request's field that has it."""

    name: str
    parameters: Any
    is_strict: bool
    place: str


@dataclass(frozen=True)
class Tools:
    """definitions: the request's objects as they came, key order included; is_parallel: whether an answer may
    have several calls; is_call_required: whether it must have one; names: what may be called, if not all."""

    definitions: Sequence[Mapping[str, Any]]
    is_parallel: bool
    is_call_required: bool = False
    names: frozenset[str] | None = None

    @property
    def is_constrained(self) -> bool:
        """Whether not every call, and every answer without one, is right."""
        is_limited = self.is_call_required or self.names is not None
        return is_limited or any(tool.is_strict for tool in self.callable)

    @property
    def callable(self) -> list[OfferedTool]:
        functions = [tool["function"] for tool in self.definitions]
        return [
            OfferedTool(
                name=function["name"],
                parameters=function.get("parameters"),
                is_strict=bool(function.get("strict")),
                place=f"tools[{index}].function.parameters",
            )
            for index, function in enumerate(functions)
            if self.names is None or function["name"] in self.names
        ]

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
    _check_choice(request.tool_choice, names)


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
    is_parallel = request.parallel_tool_calls is not False
    definitions = [_without_hints(tool) for tool in request.tools]
    match request.tool_choice:
        case NamedTool(function=function):
            names = frozenset({function.name})
            return Tools(definitions, is_parallel=False, is_call_required=True, names=names)
        case AllowedTools(allowed_tools=allowed):
            names = frozenset(tool.function.name for tool in allowed.tools)
            return Tools(definitions, is_parallel, allowed.mode == "required", names)
        case choice:
            return Tools(definitions, is_parallel, is_call_required=choice == "required")


def _without_hints(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """As it came, but for what is said to caches and not to the model."""
    return {name: value for name, value in tool.items() if name != "cache_control"}


def _check_choice(choice: ToolChoice | None, names: set[str]) -> None:
    match choice:
        case NamedTool(function=function):
            wanted = [function.name]
        case AllowedTools(allowed_tools=allowed):
            wanted = [tool.function.name for tool in allowed.tools]
        case _:
            wanted = []
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise BadRequestError(f"tool_choice: there is no tool {unknown[0]!r} in tools", "tool_choice")
    if choice == "required" and not names:
        raise BadRequestError("tool_choice: 'required' needs tools", "tool_choice")


def _converted(definition: Mapping[str, Any], param: str) -> Tool:
    try:
        return msgspec.convert(definition, Tool)
    except msgspec.ValidationError as error:
        message, path = split_location(str(error))
        where = f"{param}.{path}" if path else param
        raise BadRequestError(f"{where}: {message}", where) from error
