"""Conversations in which thinking is switched from turn to turn, over GLM's own templates.

What the client gets goes back as it came; each prompt is what the template makes of it, in plain Jinja.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from glm_model import glm_model
from plain_jinja import NAMES, rendered, template_of
from scripted_engine import ScriptedEngine

from nybble.server.app import create_app
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return glm_model(tmp_path_factory.mktemp("glm"), template_of(name))


class Conversation:
    """Plays the model's side. `messages` are the client's, `plain` those for the template."""

    def __init__(self, name: str, model: ServedModel) -> None:
        self.name = name
        self.model = model
        self.messages: list[dict[str, Any]] = []
        self.plain: list[dict[str, Any]] = []

    def hear(self, **message: Any) -> None:
        self.messages.append(message)
        self.plain.append({key: value for key, value in message.items() if key != "tool_call_id"})

    def answer(self, thought: str | None, content: str, call: bool = False, **fields: Any) -> dict[str, Any]:
        """One turn; with `thought` None thinking is off. Returns the message, which goes back."""
        options = {} if thought is not None else {"enable_thinking": False}
        kept = {"clear_thinking": False} if fields.pop("is_kept", False) else {}
        engine = ScriptedEngine(self.model.tokenizer.encode(self._written(thought, content, call)))
        body = {"model": self.model.name, "messages": self.messages, "tools": [TOOL]} | fields
        body["chat_template_kwargs"] = options | kept
        message = self._send(engine, body)["choices"][0]["message"]
        prompt = self.model.tokenizer.decode(engine.requests[0].prompt_token_ids)
        assert prompt == rendered(self.name, self.plain, [TOOL], **options, **kept)
        self.messages.append(message)
        self.plain.append(_for_template(message))
        return message

    def _written(self, thought: str | None, content: str, call: bool) -> str:
        """As models of this kind do it: 4.7's prompt opens the thought, with 4.6 the model does."""
        markup = "<tool_call>look</tool_call>" if call else ""
        if thought is None:
            return content + markup
        start = "" if self.name.startswith("GLM-4.7") else "\n<think>"
        return f"{start}{thought}</think>\n{content}{markup}"

    def _send(self, engine: ScriptedEngine, body: dict[str, Any]) -> dict[str, Any]:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(create_app(engine, self.model, ServerConfig()))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post("/v1/chat/completions", json=body)

        response = asyncio.run(asyncio.wait_for(send(), 60))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    plain = {"role": "assistant", "content": message["content"] or ""}
    if "reasoning_content" in message:
        plain["reasoning_content"] = message["reasoning_content"]
    if "tool_calls" in message:
        plain["tool_calls"] = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    return plain


@pytest.mark.parametrize("is_kept", [False, True], ids=["interleaved", "preserved"])
def test_thinking_from_turn_to_turn(name: str, model: ServedModel, is_kept: bool) -> None:
    chat = Conversation(name, model)
    chat.hear(role="user", content="U1")
    first = chat.answer("T1", "", call=True, is_kept=is_kept)
    assert (first["reasoning_content"], first["content"]) == ("T1", None)
    chat.hear(role="tool", content="R1", tool_call_id=first["tool_calls"][0]["id"])
    assert chat.answer("T2", "A2", is_kept=is_kept)["reasoning"] == "T2"
    chat.hear(role="user", content="U2")
    plain = chat.answer(None, "A3", is_kept=is_kept)
    assert plain["content"] == "A3" and "reasoning_content" not in plain
    chat.hear(role="user", content="U3")
    last = chat.answer("T4", "A4", is_kept=is_kept)
    assert (last["reasoning_content"], last["content"]) == ("T4", "A4")
    if name.startswith("GLM-4.7"):  # 4.6 knows no thoughts that are kept beyond a user's turn
        chat.hear(role="user", content="U4")
        prompt = rendered(name, chat.plain, [TOOL], **({"clear_thinking": False} if is_kept else {}))
        assert ("T1" in prompt, "T4" in prompt) == (is_kept, is_kept)


@pytest.mark.parametrize("thought", ["T", None])
def test_an_answer_is_gone_on_with(name: str, model: ServedModel, thought: str | None) -> None:
    chat = Conversation(name, model)
    chat.hear(role="user", content="U1")
    message = {"role": "assistant", "content": "begun"}
    if thought is not None:
        message["reasoning_content"] = thought
    engine = ScriptedEngine(model.tokenizer.encode(" and done"))
    body = {"model": model.name, "messages": [*chat.messages, message], "continue_final_message": True}
    answer = chat._send(engine, body)["choices"][0]["message"]
    assert answer["content"] == " and done"
    prompt = model.tokenizer.decode(engine.requests[0].prompt_token_ids)
    whole = rendered(name, [*chat.plain, message], add_generation_prompt=False)
    assert prompt.endswith("begun") and whole.startswith(prompt)


def test_torn_arguments_do_not_stop_a_chat(name: str, model: ServedModel) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Par'}}
    messages = [
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "no JSON"},
    ]
    engine = ScriptedEngine(model.tokenizer.encode("A"))
    Conversation(name, model)._send(engine, {"model": model.name, "messages": messages})
    assert '{"city": "Par</arg_value>' in model.tokenizer.decode(engine.requests[0].prompt_token_ids)
