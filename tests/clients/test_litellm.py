"""LiteLLM, by its providers for OpenAI's API and for vLLM's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
import pytest

PARIS = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(params=["openai/glm", "hosted_vllm/glm"])
def options(request: pytest.FixtureRequest, parrot: str) -> dict[str, Any]:
    return {"model": request.param, "api_base": f"{parrot}/v1", "api_key": "none", "num_retries": 0}


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_thought_and_answer(options: dict[str, Any]) -> None:
    answer = litellm.completion(messages=says("R</think>A"), **options)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("R", "A")
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def test_streamed_and_put_together(options: dict[str, Any]) -> None:
    messages = says(f"R</think>A{PARIS}")
    chunks = list(
        litellm.completion(
            messages=messages, tools=[WEATHER], stream=True, stream_options={"include_usage": True}, **options
        )
    )
    whole = litellm.stream_chunk_builder(chunks, messages=messages)
    message = whole.choices[0].message
    assert (message.reasoning_content, message.content) == ("R", "A")
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.usage.completion_tokens_details.reasoning_tokens > 0


def test_a_tool_and_its_result(options: dict[str, Any]) -> None:
    messages: list[Any] = says(f"</think>{PARIS}")
    message = litellm.completion(messages=messages, tools=[WEATHER], **options).choices[0].message
    (call,) = message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "Warm</think>It is warm."}]
    again = litellm.completion(messages=messages, tools=[WEATHER], **options).choices[0].message
    assert (again.reasoning_content, again.content) == ("Warm", "It is warm.")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_be(random_glm: str, choice: Any) -> None:
    function = {"name": "get_weather", "strict": True, "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }}  # fmt: skip
    message = litellm.completion(
        model="openai/glm", api_base=f"{random_glm}/v1", api_key="none", num_retries=0,
        messages=says("hello"), tools=[{"type": "function", "function": function}], tool_choice=choice,
        reasoning_effort="none", parallel_tool_calls=False, max_tokens=1000,
        allowed_openai_params=["reasoning_effort"],
    ).choices[0].message  # fmt: skip
    (call,) = message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"} and len(arguments["city"]) <= 5 and arguments["days"] <= 9


def test_async(options: dict[str, Any]) -> None:
    async def run() -> list[Any]:
        made = (litellm.acompletion(messages=says(f"</think>{n}"), **options) for n in range(8))
        return await asyncio.gather(*made)

    assert [a.choices[0].message.content for a in asyncio.run(run())] == [str(n) for n in range(8)]


def test_too_long_a_prompt_is_known_as_such(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=says("a" * 100_000), **options)


def test_other_errors(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="top_logprobs"):
        litellm.completion(messages=says("x"), logprobs=True, top_logprobs=50, **options)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=says("x"), **(options | {"model": "openai/another"}))
    with pytest.raises(litellm.NotFoundError):
        litellm.embedding(input=["x"], **options)
