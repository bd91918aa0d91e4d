from __future__ import annotations

from pathlib import Path
from typing import Any

import glm_template
import msgspec
import pytest
from tiny_tokenizer import write_tokenizer

from nybble.engine.sampling.thinking_limit import ThinkingBudget
from nybble.engine.tokenizer import Tokenizer
from nybble.server.chat.thinking import (
    ends_in_thought,
    has_thinking,
    past_thought,
    template_options,
    thinking_budget,
)
from nybble.server.errors import BadRequestError
from nybble.server.requests.schemas import ChatCompletionRequest, ChatMessage
from nybble.server.served_model import ServedModel


def _options(**fields: Any) -> dict[str, bool]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return template_options(msgspec.convert(body, ChatCompletionRequest))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, {}),
        ({"chat_template_kwargs": {}}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
        ({"chat_template_kwargs": {"clear_thinking": False}}, {"clear_thinking": False}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "minimal"}, {"enable_thinking": True}),
        ({"reasoning_effort": "max"}, {"enable_thinking": True}),
        ({"reasoning": {"effort": "none"}}, {"enable_thinking": False}),
        ({"reasoning": {"enabled": False}}, {"enable_thinking": False}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        (
            {"thinking": {"type": "enabled", "clear_thinking": False}, "reasoning_effort": "high"},
            {"enable_thinking": True, "clear_thinking": False},
        ),
    ],
)
def test_what_each_field_says(fields: dict[str, Any], wanted: dict[str, bool]) -> None:
    assert _options(**fields) == wanted


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            "reasoning_effort",
        ),
        ({"reasoning": {"enabled": True, "effort": "none"}}, "reasoning.effort"),
        (
            {"thinking": {"clear_thinking": True}, "chat_template_kwargs": {"clear_thinking": False}},
            "thinking.clear_thinking",
        ),
    ],
)
def test_contradictions(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError, match="contradicts") as caught:
        _options(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [(None, None, None), ("a", None, "a"), (None, "a", "a"), ("a", "a", "a"), ("", None, "")],
)
def test_a_past_thought_by_either_name(first: str | None, second: str | None, wanted: str | None) -> None:
    message = ChatMessage(role="assistant", reasoning_content=first, reasoning=second)
    assert past_thought(0, message) == wanted


def test_two_past_thoughts_of_one_message() -> None:
    with pytest.raises(BadRequestError) as caught:
        past_thought(3, ChatMessage(role="assistant", reasoning_content="a", reasoning="b"))
    assert caught.value.param == "messages[3].reasoning"


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("<|user|>hi<|assistant|><think>", True),
        ("<|assistant|><think>\n", True),
        ("<|assistant|></think>", False),
        ("<|user|>what is <think>?<|assistant|>", False),
        ("", False),
    ],
)
def test_whether_a_prompt_ends_in_a_thought(prompt: str, wanted: bool) -> None:
    assert ends_in_thought(prompt) == wanted


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(glm_template.TEXT_TOKENS, True), (("<think>",), False), ((), False)]
)
def test_whether_a_model_thinks(tmp_path: Path, tokens: tuple[str, ...], wanted: bool) -> None:
    write_tokenizer(tmp_path, text_tokens=tokens)
    assert has_thinking(Tokenizer(tmp_path)) == wanted


def _ids(tokenizer: Tokenizer, *tags: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(tag)[0] for tag in tags)


def _asked(**fields: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "thinking_token_budget": 7}
    return msgspec.convert(body | fields, ChatCompletionRequest)


def test_a_budget_by_how_the_prompt_ends(glm: ServedModel) -> None:
    tokenizer = glm.tokenizer
    end, start, call = _ids(tokenizer, "</think>", "<think>", "<tool_call>")
    in_thought = thinking_budget(_asked(), tokenizer, "<|assistant|><think>")
    assert in_thought == ThinkingBudget(num_tokens=7, end_token_ids=(end,))
    open_to_it = thinking_budget(_asked(), tokenizer, "<|assistant|>")
    assert open_to_it == ThinkingBudget(num_tokens=7, end_token_ids=(end,), start_token_id=start)
    with_tools = thinking_budget(_asked(tools=[{}]), tokenizer, "<think>")
    assert with_tools == ThinkingBudget(num_tokens=7, end_token_ids=(end, call))
    assert thinking_budget(_asked(), tokenizer, "<|assistant|></think>") is None
    assert thinking_budget(_asked(thinking_token_budget=None), tokenizer, "<think>") is None


def test_a_budget_for_a_model_without_thoughts(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, text_tokens=())
    with pytest.raises(BadRequestError, match="not supported by this model") as caught:
        thinking_budget(_asked(), Tokenizer(tmp_path), "<|assistant|>")
    assert caught.value.param == "thinking_token_budget"
