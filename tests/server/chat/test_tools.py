from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from nybble.server.chat.tools import check_tools, offered_tools
from nybble.server.errors import BadRequestError
from nybble.server.requests.schemas import ChatCompletionRequest
from nybble.server.served_model import ServedModel


def _tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | function}


def _request(**fields: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return msgspec.convert(body, ChatCompletionRequest)


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{}], "tools[0].type"),
        ([_tool(), {"type": "custom", "custom": {}}], "tools[1].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": {"name": 3}}], "tools[0].function.name"),
        ([_tool("")], "tools[0].function.name"),
        ([_tool("two words")], "tools[0].function.name"),
        ([_tool("x" * 257)], "tools[0].function.name"),
        ([_tool(), _tool()], "tools[1].function.name"),
        ([_tool(parameters=[])], "tools[0].function.parameters"),
    ],
)
def test_a_wrong_tool_is_named(tools: list[Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        check_tools(_request(tools=tools))
    assert caught.value.param == param
    assert param in caught.value.message


def test_tools_as_they_come(glm: ServedModel) -> None:
    definitions = [_tool(strict=False, parameters={"type": "object"}, extra=1), _tool("ns.g/h:i-1")]
    request = _request(tools=definitions)
    check_tools(request)
    tools = offered_tools(request, glm.tokenizer)
    assert tools and tools.is_parallel
    assert json.dumps(tools.definitions) == json.dumps(definitions)  # the order of keys too


NAMED = {"type": "function", "function": {"name": "f"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    listed = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": listed}}


@pytest.mark.parametrize(
    ("choice", "is_required", "is_parallel", "names"),
    [
        (None, False, True, {"f", "g"}),
        ("auto", False, True, {"f", "g"}),
        ("required", True, True, {"f", "g"}),
        (NAMED, True, False, {"f"}),
        (allowed("auto", "g"), False, True, {"g"}),
        (allowed("required", "g", "f"), True, True, {"f", "g"}),
    ],
)
def test_which_calls_are_asked_for(
    glm: ServedModel, choice: Any, is_required: bool, is_parallel: bool, names: set[str]
) -> None:
    request = _request(tools=[_tool("f"), _tool("g")], tool_choice=choice)
    check_tools(request)
    tools = offered_tools(request, glm.tokenizer)
    assert tools and (tools.is_call_required, tools.is_parallel) == (is_required, is_parallel)
    assert {tool.name for tool in tools.callable} == names
    assert tools.is_constrained is (choice not in (None, "auto"))
    assert len(tools.definitions) == 2, "the prompt has all of them"


def test_strict_tools_constrain_an_answer(glm: ServedModel) -> None:
    tools = offered_tools(_request(tools=[_tool("f"), _tool("g", strict=True)]), glm.tokenizer)
    assert tools and tools.is_constrained
    assert [(tool.is_strict, tool.place) for tool in tools.callable] == [
        (False, "tools[0].function.parameters"),
        (True, "tools[1].function.parameters"),
    ]


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ([], "required"),
        (None, "required"),
        (None, NAMED),
        ([_tool("g")], NAMED),
        ([_tool("g")], allowed("auto", "g", "f")),
    ],
)
def test_a_choice_of_no_tool_is_refused(tools: Any, choice: Any) -> None:
    with pytest.raises(BadRequestError, match=r"^tool_choice: ") as caught:
        check_tools(_request(tools=tools, tool_choice=choice))
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [_tool()], "tool_choice": "none"}])
def test_no_tools(glm: ServedModel, fields: dict[str, Any]) -> None:
    assert offered_tools(_request(**fields), glm.tokenizer) is None


def test_a_model_without_markup(model: ServedModel) -> None:
    with pytest.raises(BadRequestError, match="not supported by this model") as caught:
        offered_tools(_request(tools=[_tool()]), model.tokenizer)
    assert caught.value.param == "tools"


def test_calls_are_read_by_the_schema_of_their_tool(glm: ServedModel) -> None:
    definitions = [
        _tool("f", parameters={"properties": {"x": {"type": "string"}}}),
        _tool("g", parameters={"properties": {"x": {"type": "integer"}}}),
    ]
    tools = offered_tools(_request(tools=definitions, parallel_tool_calls=False), glm.tokenizer)
    assert tools and not tools.is_parallel
    types_of_tool = tools.call_rules().types_of_tool
    assert [types_of_tool(name).of("x").to_json("3") for name in ("f", "g", "h")] == ['"3"', "3", "3"]
