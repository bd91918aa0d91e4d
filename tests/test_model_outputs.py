"""Whatever a model writes becomes an answer: from tokens through HTTP, at every split of it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import pytest
from glm_model import glm_model
from hypothesis import given, settings
from hypothesis import strategies as st
from model_outputs import (
    CALL_TAGS,
    GLM_4_6,
    GLM_4_7,
    PAYLOAD,
    TOOLS,
    Markup,
    arguments_of,
    torn,
    well_formed,
)
from scripted_engine import ScriptedEngine, Together

from nybble.engine.messages import FinishReason
from nybble.server.app import create_app
from nybble.server.chat.answer_message import AnswerMessage
from nybble.server.chat.answer_parser import AnswerParser
from nybble.server.chat.answer_stream import AnswerDelta
from nybble.server.chat.tools import Tools
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig

NUM_LONG = 5_000  # outputs of each kind in the long runs: `pytest -m slow`
_RULES = Tools(TOOLS, is_parallel=True).call_rules()
Fields = dict[str, Any]


@dataclass
class Told:
    """An answer as the client has it. calls: names, and arguments as text."""

    reasoning: str
    content: str
    calls: list[tuple[str, str]]
    finish_reason: str
    usage: Fields

    def payload(self) -> Counter[str]:
        texts = [self.reasoning, self.content, *(text for call in self.calls for text in call)]
        return _payload("".join(texts))


class Desk:
    """A server in this process, whose engine writes what it is given."""

    def __init__(self, model: ServedModel, runner: asyncio.Runner) -> None:
        self.model = model
        self._engine = ScriptedEngine([])
        self._runner = runner
        transport = httpx.ASGITransport(create_app(self._engine, model, ServerConfig()))
        self._client = httpx.AsyncClient(transport=transport, base_url="http://test")

    def tokens(self, output: Sequence[str | bytes], random: Random) -> list[int]:
        """Tags as tokens or spelled; bytes as they are."""
        ids: list[int] = []
        for piece in output:
            if isinstance(piece, bytes):
                ids += piece
            elif random.random() < 0.3:
                ids += piece.encode()
            else:
                ids += self.model.tokenizer.encode(piece)
        return ids

    def text(self, token_ids: Sequence[int]) -> str:
        tokenizer = self.model.tokenizer
        shown = [token_id for token_id in token_ids if not tokenizer.is_special(token_id)]
        return b"".join(map(tokenizer.token_bytes, shown)).decode("utf-8", "replace")

    def ask(self, token_ids: Sequence[int], finish_reason: FinishReason, fields: Fields) -> Told:
        """The answer, which is the same whole, token by token, and streamed, in groups of tokens."""
        (end,) = self.model.tokenizer.encode("<|end|>")
        script = [*token_ids, end] if finish_reason == "stop" else [*token_ids] or [end]
        asked = {"model": "glm", "messages": [{"role": "user", "content": "?"}]} | fields
        self._engine.play(script, finish_reason)
        whole = self._whole(self._post(asked))
        self._engine.play(_grouped(script), finish_reason)
        streamed = asked | {"stream": True, "stream_options": {"include_usage": True}}
        assert self._joined(self._post(streamed)) == whole
        return whole

    def _post(self, body: Fields) -> bytes:
        response = self._runner.run(self._client.post("/v1/chat/completions", json=body))
        assert response.status_code == 200, response.text
        return response.content

    def _whole(self, data: bytes) -> Told:
        answer = json.loads(data)
        (choice,) = answer["choices"]
        message = choice["message"]
        assert message.get("reasoning") == message.get("reasoning_content")
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
        return Told(
            *(message.get("reasoning_content", ""), message["content"] or "", calls),
            *(choice["finish_reason"], _counts(answer["usage"])),
        )

    def _joined(self, data: bytes) -> Told:
        *events, done, rest = data.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        *chunks, last = (json.loads(event.removeprefix(b"data: ")) for event in events)
        told = Told("", "", [], "", _counts(last["usage"]))
        ids = set[str]()
        for chunk in chunks:
            (choice,) = chunk["choices"]
            delta = choice["delta"]
            told.content += delta.get("content", "")
            told.reasoning += delta.get("reasoning_content", "")
            told.finish_reason = choice["finish_reason"] or told.finish_reason
            for call in delta.get("tool_calls", ()):
                _add_call(told.calls, call, ids)
        return told


def _grouped(token_ids: Sequence[int]) -> list[Together]:
    """By sizes that the tokens decide, so that a failure comes again."""
    random, groups, place = Random(sum(token_ids)), list[Together](), 0
    most = random.choice((1, 3, 40))
    while place < len(token_ids):
        size = random.randint(1, most)
        groups.append(Together(token_ids[place : place + size]))
        place += size
    return groups


def _counts(usage: Fields) -> Fields:
    return {key: value for key, value in usage.items() if key != "prompt_tokens_details"}


def _add_call(calls: list[tuple[str, str]], call: Fields, ids: set[str]) -> None:
    """A call begins with its name and an id of its own; then come arguments of the last one only."""
    if "id" in call:
        assert call["id"] not in ids and call["type"] == "function"
        ids.add(call["id"])
        calls.append((call["function"]["name"], ""))
    assert call["index"] == len(calls) - 1
    name, arguments = calls[-1]
    calls[-1] = name, arguments + call["function"]["arguments"]


def _payload(text: str) -> Counter[str]:
    return Counter(character for character in text if character in PAYLOAD)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with asyncio.Runner() as runner:
        yield Desk(glm_model(tmp_path_factory.mktemp("glm")), runner)


def _fields(markup: Markup) -> Fields:
    return {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": markup.is_open}}


def _check_well_formed(desk: Desk, random: Random) -> None:
    """The template here closes the thought when it is off, which a model of 4.6 opens by itself."""
    markup = random.choice((GLM_4_7, GLM_4_6))
    text, meant = well_formed(random, markup)
    told = desk.ask(desk.tokens([text], random), "stop", _fields(markup))
    assert (told.reasoning, told.content) == (meant.reasoning, meant.content)
    assert [(name, arguments_of(arguments)) for name, arguments in told.calls] == list(meant.calls)
    assert told.finish_reason == ("tool_calls" if meant.calls else "stop")
    _check_splits(text, markup, told)


def _check_splits(text: str, markup: Markup, told: Told) -> None:
    wanted = (told.reasoning, told.content, told.calls)
    assert _parsed(text, markup) == wanted
    for place in range(0, len(text), 1 + len(text) // 200):
        assert _parsed((text[:place], text[place:]), markup) == wanted


def _parsed(texts: Iterable[str], markup: Markup) -> tuple[str, str, list[tuple[str, str]]]:
    parser = AnswerParser(True, markup.is_open, _RULES)
    pieces = [piece for text in texts for piece in parser.feed(text)]
    answer = AnswerMessage()
    answer.add(AnswerDelta((*pieces, *parser.finish()), "", (), False, None))
    return answer.reasoning, answer.content, [(name, "".join(texts)) for name, texts in answer.calls]


def _check_torn(desk: Desk, random: Random) -> None:
    token_ids = desk.tokens(torn(random), random)
    text = desk.text(token_ids)
    finish_reason: FinishReason = random.choice(("stop", "length"))
    markup = random.choice((GLM_4_7, GLM_4_6))
    told = desk.ask(token_ids, finish_reason, _fields(markup))
    _check_nothing_is_lost(text, told)
    assert len(told.calls) <= text.count("<tool_call>")
    whole = told.calls if finish_reason == "stop" else told.calls[:-1]
    assert all(arguments_of(arguments) is not None for _, arguments in whole)
    assert told.finish_reason == ("tool_calls" if told.calls and finish_reason == "stop" else finish_reason)
    if finish_reason == "stop":
        _check_splits(text, markup, told)
    _check_other_fields(desk, token_ids)


def _check_nothing_is_lost(text: str, told: Told) -> None:
    """And nothing invented. What is cut by length may end in part of a key."""
    wanted, is_cut = _payload(text), told.finish_reason == "length" and told.calls
    assert told.payload() <= wanted
    key = text.rpartition("<arg_key>")[2].partition("<arg_value>")[0] if is_cut else ""
    assert wanted - told.payload() <= _payload(key)


def _check_other_fields(desk: Desk, token_ids: Sequence[int]) -> None:
    """One call only; no tools, so that markup is text; a stop string."""
    text = desk.text(token_ids)
    assert len(desk.ask(token_ids, "stop", {"tools": TOOLS, "parallel_tool_calls": False}).calls) <= 1
    plain = desk.ask(token_ids, "stop", {})
    assert plain.calls == [] and plain.payload() == _payload(text)
    for tag in CALL_TAGS:
        assert plain.reasoning.count(tag) + plain.content.count(tag) == text.count(tag)
    stopped = desk.ask(token_ids, "stop", {"stop": "STOP", "tools": TOOLS})
    assert "STOP" not in stopped.reasoning + stopped.content + str(stopped.calls)


SEEDS = st.integers(0, 2**64 - 1)
FUZZED = settings(max_examples=100, deadline=None)  # a busy machine is not a failure


@FUZZED
@given(seed=SEEDS)
def test_well_formed_outputs_are_read(desk: Desk, seed: int) -> None:
    _check_well_formed(desk, Random(seed))


@FUZZED
@given(seed=SEEDS)
def test_torn_outputs_become_answers(desk: Desk, seed: int) -> None:
    _check_torn(desk, Random(seed))


def test_json_nested_beyond_all_limits_is_text() -> None:
    value = "[" * 100_000
    text = f"</think><tool_call>f<arg_key>unknown</arg_key><arg_value>{value}</arg_value></tool_call>"
    _, _, [(_, arguments)] = _parsed([text], GLM_4_7)
    assert arguments_of(arguments) == {"unknown": value}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("check", [_check_well_formed, _check_torn])
def test_many_outputs(desk: Desk, check: Any) -> None:
    for seed in range(NUM_LONG):
        check(desk, Random(seed))
