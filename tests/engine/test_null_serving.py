from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer

from nybble.engine.engine_client import SubprocessEngine
from nybble.engine.engine_config import CacheConfig, EngineConfig, ParallelConfig
from nybble.engine.errors import CheckpointError, OptionError
from nybble.engine.loading import prepare
from nybble.engine.messages import AnswerEvent, Request, RequestAccepted, SamplingParams, TokenEvent
from nybble.engine.null_serving import start_null_engine


def test_it_answers_with_a_word_at_the_speed_asked_for(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    config = EngineConfig(checkpoint=str(tmp_path), null_step_ms=5.0, max_model_len=4096)
    engine, ready = start_null_engine(config)
    assert (ready.max_model_len, ready.eos_token_ids) == (4096, ())
    sampling = SamplingParams(max_tokens=20)
    engine.add(Request(request_id="a", prompt_token_ids=(1, 2, 3), sampling=sampling))
    start, events = time.monotonic(), []
    while engine.has_work:
        events += engine.step()
    assert time.monotonic() - start >= 20 * 0.005
    tokens = [event.token_id for event in events if isinstance(event, TokenEvent)]
    assert tokens == [tokenizer.encode(" word")[-1]] * 20 and not tokenizer.is_special(tokens[0])
    engine.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"null_step_ms": -1.0}, "null_step_ms is -1.0, expected a number from 0"),
        ({"null_step_ms": float("nan")}, "null_step_ms is nan"),
        ({"parallel": ParallelConfig(tensor_parallel_size=2)}, "the null model runs on one rank"),
        ({"cache": CacheConfig(block_size=0)}, "block_size is 0"),
    ],
)
def test_bad_options(change: dict[str, object], message: str) -> None:
    config = replace(EngineConfig(checkpoint="/nowhere", null_step_ms=0.0), **change)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=message):
        start_null_engine(config)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        start_null_engine(EngineConfig(checkpoint=str(tmp_path), null_step_ms=0.0))


def test_what_loads_a_checkpoint_refuses_the_option(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="null_step_ms"):
        prepare(EngineConfig(checkpoint=str(tmp_path), null_step_ms=0.0))


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)

    async def run() -> list[AnswerEvent]:
        engine = SubprocessEngine(EngineConfig(checkpoint=str(tmp_path), null_step_ms=0.0))
        await engine.start()
        try:
            request = Request(request_id="a", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=3))
            return [event async for group in engine.generate(request) for event in group]
        finally:
            await engine.stop()

    accepted, *tokens = asyncio.run(run())
    assert accepted == RequestAccepted(request_id="a")
    assert [event.finish_reason for event in tokens if isinstance(event, TokenEvent)] == [
        None,
        None,
        "length",
    ]
