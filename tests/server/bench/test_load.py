from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from paced_server import HEAD, PacedServer, Script, end_events, paced_server, text_event

from nybble.server.bench.bench_prompts import Prompts
from nybble.server.bench.load import Asked, Load, Work, run_load
from nybble.server.bench.timed_request import Target

SCRIPT = [HEAD, text_event("a"), 0.03, text_event("b"), end_events(3, 2)]
ASKED = Asked("tiny", 2, ignores_end=True)
PROMPTS = Prompts(20, 0, 0, "x")


@contextmanager
def running(*scripts: Script) -> Iterator[PacedServer]:
    """A paced server on a thread of its own."""
    started, found = threading.Event(), list[tuple[PacedServer, asyncio.Event]]()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with paced_server(*scripts) as server:
            end = asyncio.Event()
            found.append((server, end))
            started.set()
            await end.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    started.wait()
    server, end = found[0]
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def _work(server: PacedServer, load: Load) -> Work:
    return Work(Target.parse(server.url), ASKED, PROMPTS, load, seed=1)


def test_so_many_at_once() -> None:
    with running(SCRIPT) as server:
        timings = run_load(_work(server, Load(3, None, 10, 60.0)))
    assert len(timings) == len(server.bodies) == 10 and server.max_open == 3
    assert all(timing.error is None for timing in timings)
    prompts = {body["messages"][0]["content"] for body in server.bodies}
    assert prompts == {PROMPTS.text(number) for number in range(10)}
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("tiny", 2, True)
    assert body["stream"] and body["stream_options"] == {"include_usage": True}


def test_at_a_rate_answers_are_not_waited_for() -> None:
    slow = [HEAD, text_event("a"), 0.4, end_events(3, 1)]
    with running(slow) as server:
        work = _work(server, Load(None, 100.0, 12, 60.0))
        timings = run_load(work)
    assert all(timing.error is None for timing in timings) and server.max_open > 3
    timings.sort(key=lambda timing: timing.scheduled)
    due = [timing.scheduled - timings[0].scheduled for timing in timings]
    assert np.allclose(due, [seconds for _, seconds in work.arrivals()], atol=1e-6)
    assert all(timing.sent > timing.scheduled - 0.002 for timing in timings)  # uvloop counts in milliseconds


def test_arrivals_are_a_poisson_process_that_a_seed_repeats() -> None:
    work = Work(Target.parse("http://x"), ASKED, PROMPTS, Load(None, 50.0, 4000, 60.0), seed=1)
    times = [seconds for _, seconds in work.arrivals()]
    gaps = np.diff(times)
    assert times[0] == 0 and abs(gaps.mean() * 50 - 1) < 0.1 and abs(gaps.std() * 50 - 1) < 0.1
    assert times == [seconds for _, seconds in work.arrivals()]
    assert times != [seconds for _, seconds in replace(work, seed=2).arrivals()]


def test_shares_make_up_the_whole() -> None:
    work = Work(Target.parse("http://x"), ASKED, PROMPTS, Load(None, 50.0, 31, 60.0), seed=1)
    shares = [replace(work, share=share, num_shares=3) for share in range(3)]
    parts = [pair for share in shares for pair in share.arrivals()]
    assert sorted(parts) == list(work.arrivals())
    assert sorted(number for share in shares for number in share.numbers()) == list(range(31))


@pytest.mark.parametrize("load", [Load(2, None, 100, 1.5), Load(None, 20.0, 100, 1.5)])
def test_the_time_limit(load: Load) -> None:
    with running(SCRIPT, [HEAD, 30.0]) as server:
        timings = run_load(_work(server, load))
    assert timings[0].error is None and 1 < len(timings) < 100
    assert {timing.error for timing in timings[1:]} == {"not finished when the time was up"}


def test_two_processes() -> None:
    with running(SCRIPT) as server:
        timings = run_load(_work(server, Load(3, None, 7, 60.0)), num_processes=2)
    assert len(timings) == len(server.bodies) == 7 and server.max_open <= 3
    assert all(timing.error is None for timing in timings)


def test_names() -> None:
    assert (str(Load(8, None, 1, 1.0)), str(Load(None, 2.5, 1, 1.0))) == ("8 at once", "2.5/s")


def test_without_ignore_eos_the_field_is_not_sent() -> None:
    assert b"ignore_eos" not in replace(ASKED, ignores_end=False).body("x")
