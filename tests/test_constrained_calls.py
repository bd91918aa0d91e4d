"""Constrained calls through the whole engine, in a batch, without drafts and with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from glm_model import glm_model
from running import random_prompt, request, run, tiny_config, tiny_engine, tokens
from scripted_drafter import Kind, ScriptedDrafter
from tiny_glm import make_checkpoint

from nybble.engine.engine_config import SpeculationConfig
from nybble.engine.grammar.grammar import Grammar, Thought
from nybble.engine.loading import load_engine, prepare
from nybble.engine.messages import Request
from nybble.engine.tokenizer import Tokenizer
from nybble.server.chat.answer_parser import AnswerParser, Content
from nybble.server.chat.tool_call_parser import CallArguments, CallStart
from nybble.server.chat.tools import offered_tools
from nybble.server.grammars.call_grammar import call_grammar
from nybble.server.requests.schemas import ChatCompletionRequest

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 30},
        "unit": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
        "hours": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}},
    {"type": "function", "function": {"name": "time", "strict": True}},
]
CHOICES: dict[str, dict[str, Any]] = {
    "required": {"tool_choice": "required"},
    "one": {"tool_choice": "required", "parallel_tool_calls": False},
    "named": {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
    "auto": {"tool_choice": "auto"},
    "form": {"tool_choice": "auto", "content": Grammar(kind="regex", text="[a-f]{2}")},
    "thought": {"tool_choice": "required", "thinks": True},
    "may think": {"tool_choice": "required", "may_think": True},
}
MAX_TOKENS = 200  # far more than they need


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("glm")
    make_checkpoint(directory, seed=6, vocab_size=320, num_mtp_layers=1)
    glm_model(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


def grammar_of(
    tokenizer: Tokenizer,
    content: Grammar | None = None,
    thinks: bool = False,
    may_think: bool = False,
    **fields: Any,
) -> Grammar:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS} | fields
    tools = offered_tools(msgspec.convert(body, ChatCompletionRequest), tokenizer)
    start, end = (tokenizer.encode(tag)[0] for tag in ("<think>", "</think>"))
    thought = Thought(end_token_id=end, start_token_id=start if may_think else None)
    assert tools is not None
    grammar = call_grammar(tools, tokenizer, thought if thinks or may_think else None, content)
    assert grammar is not None
    return grammar


def asked(tokenizer: Tokenizer) -> list[Request]:
    """Two of each choice, and one without a grammar."""
    end, call, thought = (tokenizer.encode(tag)[0] for tag in ("<|user|>", "<tool_call>", "</think>"))
    bias = ((end, 9.0), (call, 8.0), (thought, 8.0))  # else this model hardly ever comes to an end
    items = [
        request(
            f"{name} {seed}",
            random_prompt(9 + 7 * seed, seed=n),
            max_tokens=MAX_TOKENS,
            temperature=1.0,
            seed=seed,
            stop_token_ids=(end,),
            logit_bias=bias,
            grammar=grammar_of(tokenizer, **fields),
        )
        for n, (name, fields) in enumerate(CHOICES.items())
        for seed in range(2)
    ]
    return [*items, request("plain", random_prompt(8, seed=9), max_tokens=20)]


def check_calls(tokenizer: Tokenizer, name: str, token_ids: Sequence[int]) -> int:
    """Of one answer; gives how many there are."""
    text = b"".join(map(tokenizer.token_bytes, token_ids[:-1])).decode(errors="replace")
    parser = AnswerParser(
        has_thinking=True, is_open=name.startswith("thought"), calls=grammar_rules(tokenizer)
    )
    content, calls = "", list[list[str]]()
    for piece in [*parser.feed(text), *parser.finish()]:
        if isinstance(piece, Content):
            content += piece.text
        elif isinstance(piece, CallStart):
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            calls[-1][1] += piece.text
    assert len(token_ids) < MAX_TOKENS and token_ids[-1] == tokenizer.encode("<|user|>")[0]
    for tool, arguments in calls:
        jsonschema.validate(json.loads(arguments), PARAMETERS if tool == "weather" else {"maxProperties": 0})
    assert calls or name.startswith(("auto", "form"))
    assert not content or name.startswith("auto") or (len(content) == 2 and not calls)
    return len(calls)


def grammar_rules(tokenizer: Tokenizer) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    tools = offered_tools(msgspec.convert(body, ChatCompletionRequest), tokenizer)
    assert tools is not None
    return tools.call_rules()


@pytest.fixture(scope="module")
def answers(checkpoint: Path, tokenizer: Tokenizer) -> dict[str, list[int]]:
    events = run(tiny_engine(tiny_config(checkpoint)), *asked(tokenizer))
    return {name: tokens(found) for name, found in events.items()}


def test_every_call_is_valid(tokenizer: Tokenizer, answers: dict[str, list[int]]) -> None:
    numbers = {name: check_calls(tokenizer, name, ids) for name, ids in answers.items() if name != "plain"}
    assert max(numbers.values()) > 1
    assert all(number == 1 for name, number in numbers.items() if name.startswith(("one", "named")))


@pytest.mark.parametrize("kind", ["right", "mixed"])
def test_drafts_change_nothing(
    checkpoint: Path, tokenizer: Tokenizer, answers: dict[str, list[int]], kind: Kind
) -> None:
    config = replace(tiny_config(checkpoint), speculation=SpeculationConfig(num_speculative_tokens=4))
    engine = load_engine(prepare(config), ScriptedDrafter(kind, asked(tokenizer), answers))
    assert {name: tokens(found) for name, found in run(engine, *asked(tokenizer)).items()} == answers
    stats = engine.stats().speculation
    assert stats is not None and sum(stats.num_accepted)
