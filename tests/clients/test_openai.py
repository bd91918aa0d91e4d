"""The official client: everything that a user does with it, on its own helpers and types."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionToolParam

Short = Annotated[str, pydantic.Field(max_length=6)]


class City(pydantic.BaseModel):
    name: Short
    size: Literal["small", "large"]
    is_capital: bool


WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
PARIS = (
    "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
    "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"
)


@pytest.fixture(scope="module")
def client(parrot: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{parrot}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def grammars(random_glm: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{random_glm}/v1", api_key="none", max_retries=0) as client:
        yield client


def says(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def ask(client: openai.OpenAI, text: str, **options: Any) -> ChatCompletion:
    return client.chat.completions.create(model="glm", messages=says(text), **options)


def thought(part: Any) -> str | None:
    """That of a message or delta, under both of its names."""
    extra = part.model_extra or {}
    assert extra.get("reasoning") == extra.get("reasoning_content")
    found: str | None = extra.get("reasoning_content")
    return found


def test_a_thought_and_an_answer(client: openai.OpenAI) -> None:
    completion = ask(client, "Hm, é.</think>So: 😀")
    (choice,) = completion.choices
    assert (thought(choice.message), choice.message.content) == ("Hm, é.", "So: 😀")
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    usage = completion.usage
    assert usage is not None and usage.completion_tokens_details is not None
    assert 0 < (usage.completion_tokens_details.reasoning_tokens or 0) < usage.completion_tokens
    assert completion._request_id and completion.system_fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"reasoning_effort": "none"},
        {"extra_body": {"thinking": {"type": "disabled"}}},
    ],
)
def test_thinking_off(client: openai.OpenAI, options: dict[str, Any]) -> None:
    message = ask(client, "An answer.", **options).choices[0].message
    assert (thought(message), message.content) == (None, "An answer.")


def test_length_within_a_thought(client: openai.OpenAI) -> None:
    (choice,) = ask(client, "A long thought that has no end", max_completion_tokens=6).choices
    assert (choice.finish_reason, choice.message.content) == ("length", None)
    assert thought(choice.message)


def test_a_stream(client: openai.OpenAI) -> None:
    reasoning, content, usage = "", "", None
    stream = client.chat.completions.create(
        model="glm", messages=says("R</think>A"), stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            reasoning += thought(choice.delta) or ""
            content += choice.delta.content or ""
    assert (reasoning, content) == ("R", "A")
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_that_is_left(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="glm", messages=says("</think>" + "a" * 5000), stream=True
    ) as stream:
        next(iter(stream))
    assert ask(client, "</think>still here").choices[0].message.content == "still here"


def test_the_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="glm", messages=says("R</think>An answer")) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == "An answer"
    assert final.choices[0].finish_reason == "stop"


def test_async_clients_side_by_side(parrot: str) -> None:
    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{parrot}/v1", api_key="none") as client:

            async def whole(number: int) -> str | None:
                made = await client.chat.completions.create(model="glm", messages=says(f"</think>{number}"))
                return made.choices[0].message.content

            async def streamed(number: int) -> str | None:
                async with client.chat.completions.stream(
                    model="glm", messages=says(f"</think>{number}")
                ) as stream:
                    final = await stream.get_final_completion()
                return final.choices[0].message.content

            return await asyncio.gather(*map(whole, range(8)), *map(streamed, range(8, 16)))

    assert asyncio.run(run()) == [str(number) for number in range(16)]


def test_tools_to_the_result(client: openai.OpenAI) -> None:
    """The client's own objects go back as they came."""
    messages = says(f"I look.</think>One moment.{PARIS}")
    (choice,) = client.chat.completions.create(model="glm", messages=messages, tools=[WEATHER]).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "One moment.")
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 3}
    returned: Any = choice.message
    messages += [returned, {"role": "tool", "tool_call_id": call.id, "content": "It is warm.</think>Warm!"}]
    (choice,) = client.chat.completions.create(model="glm", messages=messages, tools=[WEATHER]).choices
    assert (thought(choice.message), choice.message.content) == ("It is warm.", "Warm!")


def test_streamed_tool_calls(client: openai.OpenAI) -> None:
    calls: dict[int, list[str]] = {}
    stream = client.chat.completions.create(
        model="glm",
        messages=says(f"</think>{PARIS}{PARIS}"),
        tools=[WEATHER],
        tool_choice="auto",
        stream=True,
    )
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function is not None
            made = calls.setdefault(call.index, ["", ""])
            made[0] += call.function.name or ""
            made[1] += call.function.arguments or ""
    assert [(name, json.loads(arguments)) for name, arguments in calls.values()] == [
        ("get_weather", {"city": "Paris", "days": 3})
    ] * 2


def test_tool_choice_none(client: openai.OpenAI) -> None:
    (choice,) = ask(client, f"</think>{PARIS}", tools=[WEATHER], tool_choice="none").choices
    assert (choice.finish_reason, choice.message.content) == ("stop", PARIS)
    assert choice.message.tool_calls is None


def test_parse_with_a_model_of_pydantic(grammars: openai.OpenAI) -> None:
    completion = grammars.chat.completions.parse(
        model="glm",
        messages=says("hello"),
        response_format=City,
        max_tokens=3000,
        extra_body={"thinking_token_budget": 4},
    )
    city = completion.choices[0].message.parsed
    assert isinstance(city, City)


def test_parse_in_a_stream(grammars: openai.OpenAI) -> None:
    with grammars.chat.completions.stream(
        model="glm",
        messages=says("hello"),
        response_format=City,
        max_tokens=3000,
        reasoning_effort="none",
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, City)


def test_parse_of_what_length_has_cut(grammars: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        grammars.chat.completions.parse(
            model="glm", messages=says("hello"), response_format=City, max_tokens=3, reasoning_effort="none"
        )


class FindRoute(pydantic.BaseModel):
    """A route."""

    start: Short
    is_fast: bool
    stops: Annotated[list[Short], pydantic.Field(max_length=2)]
    mode: Literal["car", "train"]


ROUTE = openai.pydantic_function_tool(FindRoute)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "FindRoute"}}])
def test_a_call_that_must_be(grammars: openai.OpenAI, choice: Any) -> None:
    """Of a random model, held to the schema of a class."""
    completion = grammars.chat.completions.parse(
        model="glm",
        messages=says("hello"),
        tools=[ROUTE],
        tool_choice=choice,
        parallel_tool_calls=False,
        reasoning_effort="none",
        max_tokens=1000,
    )
    (call,) = completion.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, FindRoute)


def test_a_call_in_the_stream_helper(grammars: openai.OpenAI) -> None:
    done = []
    with grammars.chat.completions.stream(
        model="glm",
        messages=says("hello"),
        tools=[ROUTE],
        tool_choice="required",
        parallel_tool_calls=False,
        reasoning_effort="none",
        max_tokens=1000,
    ) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.done":
                done.append((event.name, event.parsed_arguments))
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    ((name, arguments),) = done
    assert name == "FindRoute" and isinstance(arguments, FindRoute)


def test_calls_of_strict_tools_by_choice_of_the_model(client: openai.OpenAI) -> None:
    """It writes what it is told to here: text, then two calls."""
    call = (
        "<tool_call>FindRoute<arg_key>start</arg_key><arg_value>é</arg_value><arg_key>is_fast</arg_key>"
        "<arg_value>true</arg_value><arg_key>stops</arg_key><arg_value>[]</arg_value>"
        "<arg_key>mode</arg_key><arg_value>car</arg_value></tool_call>"
    )
    completion = client.chat.completions.parse(
        model="glm", messages=says(f"R</think>Look:{call}{call}"), tools=[ROUTE]
    )
    message = completion.choices[0].message
    assert message.content == "Look:"
    assert [call.function.parsed_arguments for call in message.tool_calls or ()] == [
        FindRoute(start="é", is_fast=True, stops=[], mode="car")
    ] * 2


def test_several_choices_and_logprobs(client: openai.OpenAI) -> None:
    completion = ask(client, "</think>ok", n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    for choice in completion.choices:
        assert choice.message.content == "ok"
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert "".join(entry.token for entry in choice.logprobs.content) == "</think>ok"
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="glm", prompt=["one", "two"], max_tokens=20)
    assert [choice.text for choice in whole.choices] == ["one", "two"]
    chunks = client.completions.create(model="glm", prompt="three", max_tokens=20, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "three"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["glm"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_raw_responses(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="glm", messages=says("</think>x"))
    assert raw.headers["x-request-id"] and raw.parse().choices[0].message.content == "x"
    with client.chat.completions.with_streaming_response.create(
        model="glm", messages=says("</think>x"), stream=True
    ) as response:
        *_, done = (line for line in response.iter_lines() if line)
    assert done == "data: [DONE]"


@pytest.mark.parametrize(
    "use",
    [
        lambda client: client.embeddings.create(model="glm", input="x"),
        lambda client: client.responses.create(model="glm", input="x"),
        lambda client: client.moderations.create(input="x"),
        lambda client: client.images.generate(prompt="x"),
        lambda client: client.files.list(),
    ],
)
def test_what_is_not_there_is_not_found(client: openai.OpenAI, use: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="no such route"):
        use(client)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "y"}}}},
         "response_format.json_schema.schema"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"max_tokens": 1 << 20}, "max_tokens"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field(grammars: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(grammars, "hello", **options)
    assert caught.value.param == param
    assert param in caught.value.message
