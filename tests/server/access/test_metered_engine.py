from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, Together

from nybble.engine.messages import Request, SamplingParams, TokenEvent
from nybble.server.access.account import Account
from nybble.server.access.api_keys import APIKey
from nybble.server.access.metered_engine import AskedPrompt, MeteredEngine
from nybble.server.access.prices import Prices
from nybble.server.access.usage_ledger import DayUse
from nybble.server.access.visit import Visit
from nybble.server.errors import TooManyRequestsError

CONTEXT = 100


def visit(**limits: Any) -> Visit:
    key = APIKey(name="ann", sha256=hashlib.sha256(b"ann").hexdigest(), **limits)
    account = Account(key, DayUse(), Prices(), lambda: 0.0, lambda: 0.0)
    account.begin()
    return Visit("ann", account, Prices())


def run(engine: MeteredEngine, prompt: tuple[int, ...], max_tokens: int) -> list[TokenEvent]:
    async def events() -> list[TokenEvent]:
        request = Request(
            request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens)
        )
        return [event async for group in engine.generate(request) for event in group]

    return asyncio.run(events())


def used(one: Visit) -> tuple[int, int, int]:
    (entry,) = one.entries(0.0)
    return entry.prompt_tokens, entry.cached_tokens, entry.completion_tokens


def test_a_prompt_is_charged_as_often_as_it_was_asked() -> None:
    """Not once for each of its answers; equal prompts each."""
    one, same, other = visit(), (1, 2, 3), (4, 5)
    prompts = [AskedPrompt(same, 2, 5), AskedPrompt(other, 2, 5), AskedPrompt(same, 2, 5)]
    engine = MeteredEngine(ScriptedEngine([65, 66], num_cached_tokens=1), one, prompts, CONTEXT)
    for prompt in (same, same, other, same, other, same):
        run(engine, prompt, 5)
    assert used(one) == (3 + 2 + 3, 3, 12)


def test_a_prompt_alone_has_no_answer_to_charge() -> None:
    one = visit(tokens_per_day=3)
    engine = MeteredEngine(ScriptedEngine([65]), one, [AskedPrompt((1, 2, 3), 1, 0)], CONTEXT)
    run(engine, (1, 2, 3), 0)
    assert used(one) == (3, 0, 0)


def test_a_request_that_may_use_too_much_is_refused_before_it_runs() -> None:
    scripted, one = ScriptedEngine([65]), visit(tokens_per_day=30)
    for prompts in ([AskedPrompt((1,) * 10, 2, 11)], [AskedPrompt((1,) * 10, 1, 6)] * 2):
        with pytest.raises(TooManyRequestsError):
            MeteredEngine(scripted, one, prompts, CONTEXT)
    MeteredEngine(scripted, one, [AskedPrompt((1,) * 10, 2, 10)], CONTEXT)
    assert scripted.requests == []


def test_an_answer_without_a_limit_ends_with_the_day() -> None:
    """It is the last token that the key had left, and the engine is told."""
    scripted, one = ScriptedEngine([65] * 50), visit(tokens_per_day=30)
    engine = MeteredEngine(scripted, one, [AskedPrompt((1,) * 10, 1, CONTEXT - 10)], CONTEXT)
    events = run(engine, (1,) * 10, CONTEXT - 10)
    assert [event.finish_reason for event in events] == [None] * 19 + ["length"]
    assert scripted.aborts == ["r"] and scripted.num_emitted == 20
    assert used(one) == (10, 0, 20)


def test_answers_without_a_limit_run_side_by_side() -> None:
    async def scenario() -> list[int]:
        one = visit(tokens_per_day=50)
        prompt = AskedPrompt((1,) * 10, 3, CONTEXT - 10)
        engine = MeteredEngine(ScriptedEngine([65] * 60), one, [prompt], CONTEXT)
        sampling = SamplingParams(max_tokens=CONTEXT - 10)
        streams = [
            engine.generate(
                Request(request_id=str(number), prompt_token_ids=prompt.token_ids, sampling=sampling)
            )
            for number in range(3)
        ]
        counts = [0, 0, 0]
        while streams:
            for number, stream in enumerate(list(streams)):
                try:
                    await anext(stream)
                    counts[number] += 1
                except StopAsyncIteration:
                    streams.remove(stream)
        assert used(one) == (10, 0, 40)
        return counts

    counts = asyncio.run(scenario())
    assert sum(counts) == 40


def test_an_answer_within_its_own_limit_is_finished_whatever_the_day_has_left() -> None:
    one = visit(tokens_per_day=12)
    engine = MeteredEngine(ScriptedEngine([65, 66]), one, [AskedPrompt((1,) * 10, 1, 2)], CONTEXT)
    assert [event.finish_reason for event in run(engine, (1,) * 10, 2)] == [None, "stop"]


def test_an_answer_is_cut_within_tokens_that_come_together() -> None:
    one = visit(tokens_per_day=13)
    prompt = AskedPrompt((1,) * 10, 1, CONTEXT - 10)
    engine = ScriptedEngine([Together([65] * 5), 66])
    events = run(MeteredEngine(engine, one, [prompt], CONTEXT), prompt.token_ids, CONTEXT - 10)
    assert [event.finish_reason for event in events] == [None, None, "length"]
    assert used(one) == (10, 0, 3) and engine.aborts == ["r"]
