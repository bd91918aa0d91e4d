"""LangChain's chat model for OpenAI's API."""

from __future__ import annotations

import asyncio
from typing import Annotated

import openai
import pydantic
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

PARIS = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
JSON = '</think>{"name": "Paris", "is_capital": true}'


class City(pydantic.BaseModel):
    """A city."""

    name: Annotated[str, pydantic.Field(max_length=6)]
    is_capital: bool


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"{city}: warm</think>Warm."


@pytest.fixture
def chat(parrot: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{parrot}/v1", api_key="none", model="glm", max_retries=0)


def test_invoke(chat: ChatOpenAI) -> None:
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage("R</think>A")])
    assert answer.text == "A"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
    assert answer.response_metadata["finish_reason"] == "stop"


def test_stream(chat: ChatOpenAI) -> None:
    chunks = list(chat.stream("R</think>An answer", stream_usage=True))
    assert "".join(chunk.text for chunk in chunks) == "An answer"
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 0


def test_batch_and_async(chat: ChatOpenAI) -> None:
    prompts = [f"</think>{number}" for number in range(6)]
    wanted = [str(number) for number in range(6)]
    assert [answer.text for answer in chat.batch(prompts)] == wanted
    assert [answer.text for answer in asyncio.run(chat.abatch(prompts))] == wanted


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_tool_to_the_end(chat: ChatOpenAI, is_stream: bool) -> None:
    bound = chat.bind_tools([get_weather])
    messages = [HumanMessage(f"</think>I look.{PARIS}")]
    if is_stream:
        first, *rest = bound.stream(messages)
        answer = sum(rest, first)
    else:
        answer = bound.invoke(messages)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    returned = AIMessage(answer.content, tool_calls=answer.tool_calls)
    assert bound.invoke([*messages, returned, result]).text == "Warm."


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_structured_output(chat: ChatOpenAI, method: str) -> None:
    asked = chat.with_structured_output(City, method=method)
    assert asked.invoke(JSON) == City(name="Paris", is_capital=True)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_of_a_random_model(random_glm: str, method: str) -> None:
    chat = ChatOpenAI(
        base_url=f"{random_glm}/v1", api_key="none", model="glm", max_retries=0,
        reasoning_effort="none", max_tokens=3000,
    )  # fmt: skip
    assert isinstance(chat.with_structured_output(City, method=method).invoke("hello"), City)


def test_errors(chat: ChatOpenAI, parrot: str) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat.invoke("x", temperature=3)
    embeddings = OpenAIEmbeddings(
        base_url=f"{parrot}/v1", api_key="none", model="glm", check_embedding_ctx_length=False, max_retries=0
    )
    with pytest.raises(openai.NotFoundError, match="no such route"):
        embeddings.embed_query("x")
