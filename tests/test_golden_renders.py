"""Prompts, byte for byte and token by token, against the checkpoint's own templates in plain Jinja.

The oracle is plain_jinja.py, over messages that golden_chats.py has by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pytest
from glm_model import glm_model
from golden_chats import CHATS, WEATHER, GoldenChat, user
from plain_jinja import NAMES, rendered, template_of

from nybble.server.chat.chat_request import parse_chat_request, prepare_chat_request
from nybble.server.served_model import ServedModel


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return glm_model(tmp_path_factory.mktemp("glm"), template_of(name))


def _token_ids(model: ServedModel, messages: Sequence[Any], **fields: Any) -> tuple[int, ...]:
    body = json.dumps({"model": model.name, "messages": messages} | fields).encode()
    return prepare_chat_request(parse_chat_request(body), model).prompt_token_ids


@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat.name)
def test_a_prompt_is_what_the_template_says(name: str, model: ServedModel, chat: GoldenChat) -> None:
    fields = ({"tools": chat.tools} if chat.tools else {}) | chat.fields
    token_ids = _token_ids(model, chat.messages, **fields)
    wanted = rendered(name, chat.template_messages, chat.tools, **chat.options)
    assert model.tokenizer.decode(token_ids) == wanted
    if not _has_token_names(name, chat):
        assert token_ids == model.tokenizer.encode(wanted)


def _has_token_names(name: str, chat: GoldenChat) -> bool:
    """GLM-4.7 has the token /nothink too, but its template does not look for it: it stays text."""
    return chat.has_token_names or (chat.name.startswith("nothink") and "/nothink" not in template_of(name))


def test_there_are_enough() -> None:
    assert len(CHATS) >= 40
    assert len({chat.name for chat in CHATS}) == len(CHATS)


TOOL_TEXTS = {  # before the tools and after: of the model cards' templates, by what facts say of their bytes
    "GLM-4.7-Flash": (
        *(170, "70ae6e2858080cd58656fd2fdc3de829e43b221f4d3f6942a523e4cd170da57e"),
        *(280, "4ff125f393a243d69ba5fc0310474fad9255bcfcbc38c47654c391a8f108e01a"),
    ),
    "GLM-4.6": (
        *(170, "70ae6e2858080cd58656fd2fdc3de829e43b221f4d3f6942a523e4cd170da57e"),
        *(286, "6b556144e44ec3eafb05fc18c869191ff9680b2dc9e40afd3b067454bc806827"),
    ),
}


def test_the_words_on_tools_have_the_known_bytes(name: str, model: ServedModel) -> None:
    """The model was trained on them."""
    prompt = model.tokenizer.decode(_token_ids(model, [user("U")], tools=[WEATHER])).encode()
    before, after = prompt.split(json.dumps(WEATHER, ensure_ascii=False).encode())
    before, after = before.removeprefix(b"[gMASK]<sop>"), after.split(b"<|user|>")[0]
    digests = [hashlib.sha256(text).hexdigest() for text in (before, after)]
    assert (len(before), digests[0], len(after), digests[1]) == TOOL_TEXTS[name]
