"""A real engine process: its events, its death, and what it costs when idle."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from processes import DEADLINE, Family, family, wait_until
from running import random_prompt, request, run, tiny_config, tiny_engine, tokens
from tiny_glm import make_checkpoint

from nybble.engine import answer_queue
from nybble.engine.engine_client import EngineStartError, SubprocessEngine
from nybble.engine.engine_config import EngineConfig, ParallelConfig
from nybble.engine.errors import (
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestTimeoutError,
)
from nybble.engine.messages import AnswerEvent, EngineStats, Request, RequestAccepted, TokenEvent

ENGINE, LAUNCHER = "nybble.engine.engine_process", "nybble.engine.ranks.launch"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    directory = tmp_path_factory.mktemp("glm")
    make_checkpoint(directory, seed=12)
    return tiny_config(directory)


@pytest.fixture(scope="module")
def two_ranks(config: EngineConfig) -> EngineConfig:
    return replace(config, parallel=ParallelConfig(tensor_parallel_size=2))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """The processes that the engine starts."""
    with family() as processes:
        for name, value in processes.mark.items():
            monkeypatch.setenv(name, value)
        yield processes


@asynccontextmanager
async def running(config: EngineConfig) -> AsyncGenerator[SubprocessEngine, None]:
    engine = SubprocessEngine(config)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def drive(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, DEADLINE))


async def collect(engine: SubprocessEngine, item: Request) -> list[int]:
    events = [event async for group in engine.generate(item) for event in group]
    assert isinstance(events[0], RequestAccepted)
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


async def first_token(groups: AsyncGenerator[Sequence[AnswerEvent], None]) -> None:
    while not any(isinstance(event, TokenEvent) for event in await anext(groups)):
        pass


async def until(condition: Callable[[], bool]) -> None:
    """Poll: the process on the other side gives no other sign."""
    while not condition():
        await asyncio.sleep(0.01)


def child() -> psutil.Process:
    (process,) = (
        process
        for process in psutil.Process().children()  # other tests may have left some
        if process.status() != psutil.STATUS_ZOMBIE and ENGINE in process.cmdline()
    )
    return process


def is_idle(stats: EngineStats | None) -> bool:
    return stats is not None and stats.num_running == stats.num_waiting == 0


def has_all_blocks(stats: EngineStats | None) -> bool:
    return stats is not None and stats.num_free_blocks == stats.num_blocks


def test_same_tokens_as_in_process(config: EngineConfig) -> None:
    items = [request(str(n), random_prompt(20 + n, seed=n), 20) for n in range(6)]
    expected = {name: tokens(events) for name, events in run(tiny_engine(config), *items).items()}

    async def work() -> None:
        async with running(config) as engine:
            results = await asyncio.gather(*(collect(engine, item) for item in items))
            assert dict(zip(expected, results, strict=True)) == expected

    drive(work())


def test_refusal_names_the_parameter_and_disturbs_nobody(config: EngineConfig) -> None:
    async def work() -> None:
        async with running(config) as engine:
            good = asyncio.create_task(collect(engine, request("good", (1, 2, 3), 30)))
            with pytest.raises(InvalidRequestError) as caught:
                await collect(engine, request("bad", (1,) * 512, 1))
            assert caught.value.parameter == "prompt"
            assert len(await good) == 30

    drive(work())


def test_timeouts_and_full_queues_are_told_apart(config: EngineConfig) -> None:
    config = replace(config, scheduler=replace(config.scheduler, max_num_seqs=1, max_waiting=1))

    async def work() -> None:
        async with running(config) as engine:
            async with aclosing(engine.generate(request("a", (1, 2, 3), 500))) as first:
                await first_token(first)
                late = msgspec.structs.replace(request("b", (1, 2, 3)), deadline=0.2)
                waiting = asyncio.create_task(collect(engine, late))
                await asyncio.sleep(0)  # until it is sent
                with pytest.raises(QueueFullError) as caught:
                    await collect(engine, request("c", (1, 2, 3)))
                assert caught.value.retry_after > 0
                with pytest.raises(RequestTimeoutError):
                    await waiting
                await anext(first)
            await until(lambda: is_idle(engine.stats) and has_all_blocks(engine.stats))

    drive(work())


def test_closing_the_iterator_aborts_and_frees_the_blocks(config: EngineConfig) -> None:
    async def work() -> None:
        async with running(config) as engine:
            async with aclosing(engine.generate(request("a", (1, 2, 3), 500))) as events:
                await first_token(events)
            await until(lambda: is_idle(engine.stats) and has_all_blocks(engine.stats))

    drive(work())


def test_an_answer_that_nobody_takes_is_ended(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """When so much of it waits; what there was can still be taken. Others go on."""
    monkeypatch.setattr(answer_queue, "_MAX_UNTAKEN", 10)

    async def scenario() -> None:
        async with running(config) as engine:
            untaken = engine.generate(request("a", random_prompt(5, seed=1), 200))
            await first_token(untaken)
            await until(lambda: engine.stats is not None and engine.stats.num_finished == {"abort": 1})
            assert len(await collect(engine, request("b", random_prompt(5, seed=2), 8))) == 8
            events = []
            with pytest.raises(RequestTimeoutError, match="10 tokens of it were not taken"):
                async for group in untaken:
                    events += group
            assert len(events) == 10
            await until(lambda: has_all_blocks(engine.stats))

    drive(scenario())


def test_death_answers_every_open_request_and_the_engine_comes_back(config: EngineConfig) -> None:
    async def work() -> None:
        async with running(config) as engine:
            streams = [engine.generate(request(str(n), (1, 2, 3), 500)) for n in range(3)]
            for stream in streams:
                await first_token(stream)
            child().send_signal(signal.SIGKILL)
            for stream in streams:
                with pytest.raises(EngineDeadError):
                    while True:
                        await anext(stream)
            with pytest.raises(EngineDeadError):
                await collect(engine, request("too soon", (1, 2, 3)))
            await until(lambda: engine.is_alive)
            assert len(await collect(engine, request("after", (1, 2, 3), 7))) == 7

    drive(work())


def test_idle_engine_uses_no_cpu(config: EngineConfig) -> None:
    async def work() -> None:
        async with running(config) as engine:
            await collect(engine, request("a", (1, 2, 3), 5))
            await until(lambda: is_idle(engine.stats))
            process = child()
            await asyncio.sleep(1.0)  # it looks at its state once more, half a second after its last word
            before = process.cpu_times()
            await asyncio.sleep(1.0)
            after = process.cpu_times()
            assert (after.user + after.system) - (before.user + before.system) == 0.0

    drive(work())


def test_stop_leaves_no_process(config: EngineConfig) -> None:
    async def work() -> None:
        async with running(config):
            process = child()
        assert not process.is_running()

    drive(work())


def launcher(started: Family) -> psutil.Process:
    (process,) = (process for process in started.members() if LAUNCHER in process.cmdline())
    return process


def test_several_ranks_give_the_tokens_of_one(
    config: EngineConfig, two_ranks: EngineConfig, started: Family
) -> None:
    items = [request(str(n), random_prompt(20 + n, seed=n), 20) for n in range(4)]
    items.append(request("sampled", random_prompt(20, seed=0), 20, temperature=1.0, seed=7))
    expected = {name: tokens(events) for name, events in run(tiny_engine(config), *items).items()}

    async def work() -> None:
        async with running(two_ranks) as engine:
            results = await asyncio.gather(*(collect(engine, item) for item in items))
            assert dict(zip(expected, results, strict=True)) == expected
            assert len(started.members()) == 3  # the launcher and two ranks
            begin = time.monotonic()
        assert time.monotonic() - begin < 5
        assert started.is_gone()

    drive(work())


async def fail_and_come_back(engine: SubprocessEngine, victim: psutil.Process, started: Family) -> None:
    """Every open request gets an error within 5 s, and all that ran is gone before it starts again."""
    before, process = started.members(), engine._process
    streams = [engine.generate(request(f"{victim.pid}-{n}", (n, 2, 3), 500)) for n in range(3)]
    for stream in streams:
        await first_token(stream)
    victim.kill()
    killed = time.monotonic()
    for stream in streams:
        with pytest.raises(EngineDeadError):
            while True:
                await anext(stream)
    assert time.monotonic() - killed < 5
    assert not engine.is_alive
    await until(lambda: engine.is_alive)
    assert process is not None and process.returncode not in (0, None)
    assert set(before).isdisjoint(started.members())


def test_whichever_process_dies_all_end_and_the_engine_comes_back(
    two_ranks: EngineConfig, started: Family
) -> None:
    item = request("before", random_prompt(20, seed=3), 20)
    victims: list[Callable[[], psutil.Process]] = [
        lambda: started.rank(1, ENGINE),
        lambda: started.rank(0, ENGINE),
        lambda: launcher(started),
    ]

    async def work() -> None:
        async with running(two_ranks) as engine:
            expected = await collect(engine, item)
            for number, victim in enumerate(victims):
                await fail_and_come_back(engine, victim(), started)
                again = msgspec.structs.replace(item, request_id=f"after {number}")
                assert await collect(engine, again) == expected
        assert started.is_gone()

    drive(work())


SERVER = """
import asyncio, sys
import msgspec
from nybble.engine import answer_queue
from nybble.engine.engine_client import SubprocessEngine
from nybble.engine.engine_config import EngineConfig

async def main():
    await SubprocessEngine(msgspec.json.decode(sys.argv[1], type=EngineConfig)).start()
    print("ready", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.parametrize("ranks", ["config", "two_ranks"])
def test_engine_ends_when_its_server_is_killed(ranks: str, request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-c", SERVER, msgspec.json.encode(request.getfixturevalue(ranks)).decode()]
    with (
        family() as processes,
        subprocess.Popen(command, stdout=subprocess.PIPE, env=processes.environment) as server,
    ):
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        assert len(processes.members()) == (2 if ranks == "config" else 4)
        server.kill()
        wait_until(processes.is_gone, DEADLINE)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json: no such file"),
        (lambda path: os.truncate(path / "model.safetensors", 5000), "model.safetensors"),
    ],
)
def test_bad_checkpoint_is_reported_and_leaves_no_process(
    tmp_path: Path, started: Family, damage: Callable[[Path], None], message: str, num_ranks: int
) -> None:
    make_checkpoint(tmp_path)
    damage(tmp_path)
    config = replace(tiny_config(tmp_path), parallel=ParallelConfig(tensor_parallel_size=num_ranks))

    async def work() -> None:
        with pytest.raises(EngineStartError, match=message):
            await SubprocessEngine(config).start()
        assert started.is_gone()

    drive(work())
