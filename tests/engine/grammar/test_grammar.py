"""Answers with a grammar through the whole engine: in batches, preempted, with drafts, planned ahead."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running import random_prompt, request, run, tiny_config, tiny_engine, tokens
from scripted_drafter import Kind, ScriptedDrafter
from tiny_glm import make_checkpoint
from tiny_tokenizer import tiny_tokenizer

from nybble.engine.engine_config import EngineConfig, SpeculationConfig
from nybble.engine.errors import InvalidRequestError
from nybble.engine.grammar.grammar import Grammar, Thought
from nybble.engine.grammar.grammar_state import GrammarState
from nybble.engine.loading import load_engine, prepare
from nybble.engine.messages import Request, RequestFailed, TokenEvent
from nybble.engine.sampling.thinking_limit import ThinkingBudget
from nybble.engine.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 9}, "s": {"type": "string", "maxLength": 5}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
MAX_TOKENS = 120  # more than any of these answers can have


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("glm")
    make_checkpoint(directory, seed=5, vocab_size=288, num_mtp_layers=1)
    tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


def asked(tokenizer: Tokenizer) -> list[Request]:
    """With grammars of all kinds, and without."""
    end, thought = (tokenizer.encode(text)[0] for text in ("<|end|>", "</think>"))
    bounded = '\\{"n": ?[0-9]{1,40}\\}'
    grammars: dict[str, Grammar | None] = {
        "plain": None,
        "schema": Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
        "regex": Grammar(kind="regex", text=bounded),
        "lark": Grammar(kind="lark", text='start: "yes" | "no" | "maybe" "!"~1..5'),
        "thought": Grammar(kind="regex", text=bounded, thought=Thought(end_token_id=thought)),
        "other": None,
        "budget": Grammar(kind="regex", text=bounded, thought=Thought(end_token_id=thought)),
    }
    budget = ThinkingBudget(num_tokens=5, end_token_ids=(thought,))
    bias = {"thought": ((thought, 9.0),)}  # else this model hardly ever ends one
    return [
        request(
            name,
            random_prompt(9 + 7 * n, seed=n),
            max_tokens=MAX_TOKENS if grammar else 30,
            temperature=1.0,
            seed=n,
            stop_token_ids=(end,) if grammar else (),
            logit_bias=bias.get(name, ()),
            grammar=grammar,
            thinking_budget=budget if name == "budget" else None,
        )
        for n, (name, grammar) in enumerate(grammars.items())
    ]


def check_answers(tokenizer: Tokenizer, answers: dict[str, list[int]]) -> None:
    texts = {name: b"".join(map(tokenizer.token_bytes, ids[:-1])) for name, ids in answers.items()}
    found = json.loads(texts["schema"])
    assert sorted(found) == ["n", "s"] and isinstance(found["n"], int) and len(found["s"]) <= 5
    assert json.loads(texts["regex"])["n"] >= 0
    assert texts["lark"] in (b"yes", b"no") or re.fullmatch(b"maybe!{1,5}", texts["lark"])
    (thought,) = tokenizer.encode("</think>")
    assert answers["budget"].index(thought) == 5  # this model does not end it by itself
    assert json.loads(texts["budget"].split(b"</think>", 1)[1])["n"] >= 0
    assert json.loads(texts["thought"].split(b"</think>", 1)[1])["n"] >= 0


def answers_of(events: dict[str, list[TokenEvent]]) -> dict[str, list[int]]:
    return {name: tokens(listed) for name, listed in events.items()}


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tokenizer: Tokenizer) -> dict[str, list[int]]:
    engine = tiny_engine(tiny_config(checkpoint))
    answers: dict[str, list[int]] = {}
    for item in asked(tokenizer):
        answers |= answers_of(run(engine, item))
    check_answers(tokenizer, answers)
    return answers


CONFIGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 13, "max_num_seqs": 3},
}


@pytest.mark.parametrize("scheduler", CONFIGS)
def test_batched_equals_alone(
    checkpoint: Path, tokenizer: Tokenizer, alone: dict[str, list[int]], scheduler: str
) -> None:
    engine = tiny_engine(tiny_config(checkpoint, **CONFIGS[scheduler]))
    assert answers_of(run(engine, *asked(tokenizer))) == alone


def test_preempted_equals_not(checkpoint: Path, tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.encode("<|end|>")
    grammar = Grammar(kind="regex", text="([a-f][0-9]{1,3}){12}x{20}")
    items = [
        request(str(n), random_prompt(5, seed=n), 99, stop_token_ids=(end,), grammar=grammar)
        for n in range(4)
    ]
    config = replace(tiny_config(checkpoint, kv_cache_memory=0.00012), max_model_len=110)
    engine = tiny_engine(config)
    plain = {item.request_id: tokens(run(engine, item)[item.request_id]) for item in items}
    assert answers_of(run(engine, *items)) == plain
    assert engine.stats().num_preemptions > 0, "the pool is too large for this test"
    for answer in plain.values():
        assert re.fullmatch("([a-f][0-9]{1,3}){12}x{20}", bytes(answer[:-1]).decode())


@pytest.mark.parametrize("kind", ["right", "wrong", "mixed"])
def test_drafts_change_nothing(
    checkpoint: Path, tokenizer: Tokenizer, alone: dict[str, list[int]], kind: Kind
) -> None:
    engine = load_engine(prepare(speculating(checkpoint)), ScriptedDrafter(kind, asked(tokenizer), alone))
    assert answers_of(run(engine, *asked(tokenizer))) == alone
    stats = engine.stats().speculation
    assert stats is not None and sum(stats.num_drafts)


def test_drafts_of_the_draft_layer_change_nothing(
    checkpoint: Path, tokenizer: Tokenizer, alone: dict[str, list[int]]
) -> None:
    assert answers_of(run(load_engine(prepare(speculating(checkpoint))), *asked(tokenizer))) == alone


def speculating(checkpoint: Path) -> EngineConfig:
    return replace(tiny_config(checkpoint), speculation=SpeculationConfig(num_speculative_tokens=4))


def test_bad_words_and_min_tokens_give_way_to_a_grammar(checkpoint: Path, tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.encode("<|end|>")
    item = request(
        "a",
        (1, 2, 3),
        stop_token_ids=(end,),
        min_tokens=9,
        bad_words=((ord("b"),), (ord("c"),)),
        grammar=Grammar(kind="regex", text="a[bd]c"),
    )
    events = run(tiny_engine(tiny_config(checkpoint)), item)["a"]
    assert tokens(events) == [*b"adc", end] and events[-1].finish_reason == "stop"


def test_a_bad_grammar_is_refused_and_others_go_on(checkpoint: Path, tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.encode("<|end|>")
    engine = tiny_engine(tiny_config(checkpoint))
    bad = Grammar(kind="regex", text="(", parameter="guided_regex")
    with pytest.raises(InvalidRequestError) as caught:
        engine.add(request("bad", (1, 2), grammar=bad, stop_token_ids=(end,)))
    assert caught.value.parameter == "guided_regex"
    with pytest.raises(InvalidRequestError, match="allowed_token_ids"):
        good = Grammar(kind="regex", text="a")
        engine.add(request("bad", (1, 2), grammar=good, stop_token_ids=(end,), allowed_token_ids=(1,)))
    assert len(run(engine, request("good", (1, 2), 5))["good"]) == 5


def test_a_grammar_that_fails_ends_its_request_alone(
    checkpoint: Path, tokenizer: Tokenizer, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a limit is reached in the middle of an answer."""
    mask = GrammarState._mask

    num_masks = 0

    def fails_at_the_third(state: GrammarState, tail: bytes) -> Any:
        nonlocal num_masks
        num_masks += 1
        if num_masks == 3:
            state.failure = "its grammar failed"
            return None
        return mask(state, tail)

    monkeypatch.setattr(GrammarState, "_mask", fails_at_the_third)
    engine = tiny_engine(tiny_config(checkpoint))
    for item in asked(tokenizer):
        if item.request_id in ("plain", "other", "schema"):
            engine.add(item)
    seen: dict[str, list[int]] = {"plain": [], "other": [], "schema": []}
    failed = []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, RequestFailed):
                failed.append((event.request_id, event.kind))
            else:
                seen[event.request_id].append(event.token_id)
        engine.check()
    assert failed == [("schema", "internal")]
    assert seen == {"plain": alone["plain"], "other": alone["other"], "schema": alone["schema"][:2]}


def test_a_slow_mask_ends_its_request_and_holds_up_others_a_moment_only(
    checkpoint: Path, tokenizer: Tokenizer, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = GrammarState._mask
    num_masks = 0

    def is_slow_at_the_third(state: GrammarState, tail: bytes) -> Any:
        nonlocal num_masks
        num_masks += state._grammar.kind == "json_schema"
        start = time.thread_time()
        while num_masks == 3 and state._grammar.kind == "json_schema" and time.thread_time() - start < 60:
            if state.failure is not None:
                return None  # the test has seen enough
        return mask(state, tail)

    monkeypatch.setattr(GrammarState, "_mask", is_slow_at_the_third)
    engine = tiny_engine(tiny_config(checkpoint))
    names = ("plain", "other", "schema", "regex")
    for item in asked(tokenizer):
        if item.request_id in names:
            engine.add(item)
    seen: dict[str, list[int]] = {name: [] for name in names}
    failed = []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, RequestFailed):
                failed.append((event.request_id, event.message))
            else:
                seen[event.request_id].append(event.token_id)
        engine.check()
    message = "the request was ended: its grammar (grammar) takes too long for a token"
    assert failed == [("schema", message)]
    assert seen == {name: alone[name] for name in ("plain", "other", "regex")} | {
        "schema": alone["schema"][:2]
    }
