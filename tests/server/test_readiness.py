from __future__ import annotations

import asyncio
import time

import pytest
from scripted_engine import Pause, ScriptedEngine

from nybble.engine.errors import EngineDeadError, QueueFullError, RequestFailedError
from nybble.server.errors import UnavailableError
from nybble.server.readiness import Readiness


def refusal(readiness: Readiness) -> str:
    with pytest.raises(UnavailableError) as caught:
        asyncio.run(readiness.check())
    assert caught.value.code == "not_ready"
    return str(caught.value)


def test_an_idle_engine_must_decode() -> None:
    engine = ScriptedEngine([65, 66])
    asyncio.run(Readiness(engine, 30).check())
    (request,) = engine.requests
    assert request.sampling.max_tokens == 2
    assert engine.num_emitted == 2


def test_a_token_that_just_came_is_enough() -> None:
    engine = ScriptedEngine([65, 66])
    engine.last_token_time = 100.0
    asyncio.run(Readiness(engine, 10, clock=lambda: 100.9).check())
    assert engine.requests == []
    asyncio.run(Readiness(engine, 10, clock=lambda: 110.0).check())
    assert len(engine.requests) == 1


def test_before_the_timeout_nobody_waits_for_the_question() -> None:
    async def scenario() -> None:
        pause = Pause()
        engine = ScriptedEngine([pause, 65, 66])
        engine.last_token_time = 100.0
        readiness = Readiness(engine, 10, clock=lambda: 101.0)
        await readiness.check()
        await pause.reached.wait()
        await readiness.check()
        assert len(engine.requests) == 1

    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize("interval", [0.07, 0.2, 0.6, 1.1])
@pytest.mark.parametrize("phase", [0.0, 0.5, 0.99])
def test_a_hang_is_noticed_within_the_timeout_and_an_interval(interval: float, phase: float) -> None:
    """By who asks every `interval` seconds, wherever between two questions it begins."""
    timeout = 0.5

    async def scenario() -> float:
        engine = ScriptedEngine([Pause()])
        readiness = Readiness(engine, timeout)
        engine.last_token_time = hang = time.monotonic()
        asked = hang + (1 - phase) * interval
        while True:
            await asyncio.sleep(max(0.0, asked - time.monotonic()))
            asked += interval
            try:
                await readiness.check()
            except UnavailableError:
                return time.monotonic() - hang

    taken = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert timeout <= taken + interval and taken <= timeout + interval + 0.15  # of a busy machine


def test_a_dead_engine_is_not_ready() -> None:
    assert refusal(Readiness(ScriptedEngine([65], is_alive=False), 30)) == "the engine is not running"


@pytest.mark.parametrize(
    "error", [RequestFailedError("boom"), QueueFullError("full", 1), EngineDeadError("gone")]
)
def test_an_engine_that_fails_is_not_ready(error: Exception) -> None:
    assert str(error) in refusal(Readiness(ScriptedEngine([error]), 30))


def test_an_engine_that_hangs_is_noticed_and_the_question_withdrawn() -> None:
    """Also after its last token has been too long ago."""
    engine = ScriptedEngine([65, Pause(), 66])
    engine.last_token_time = time.monotonic() - 1
    assert "no token in 0.045 s" in refusal(Readiness(engine, 0.05))
    assert engine.aborts == [engine.requests[0].request_id]


def test_all_who_ask_share_one_question() -> None:
    async def scenario() -> None:
        pause = Pause()
        engine = ScriptedEngine([pause, 65, 66])
        readiness = Readiness(engine, 30)
        first, gone, other = (asyncio.create_task(readiness.check()) for _ in range(3))
        await pause.reached.wait()
        gone.cancel()
        pause.resumed.set()
        await first
        await other
        assert len(engine.requests) == 1
        assert engine.aborts == []

    asyncio.run(asyncio.wait_for(scenario(), 30))
