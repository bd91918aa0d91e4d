"""Load on a server: requests at a rate, or so many at once, each timed.

Arrivals at a rate are a Poisson process: they do not wait for answers. How late a request was sent tells
whether the generator kept up. The work can be divided over processes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import uvloop

from nybble.server.bench.bench_prompts import Prompts
from nybble.server.bench.timed_request import Target, Timing, send_timed

_START_DELAY = 3.0  # seconds in which processes come up, before the first request is due


@dataclass(frozen=True)
class Load:
    """How requests come: `concurrency` at once, or `rate` a second; one of the two is None.

    max_seconds: after which none is sent, and those that are open are given up.
    """

    concurrency: int | None
    rate: float | None
    num_requests: int
    max_seconds: float

    def __str__(self) -> str:
        return f"{self.rate:g}/s" if self.concurrency is None else f"{self.concurrency} at once"


@dataclass(frozen=True)
class Asked:
    """What every request asks for, but its prompt. ignores_end: `ignore_eos`, so that lengths are exact
    where the server knows the field."""

    model: str
    num_output_tokens: int
    ignores_end: bool

    def body(self, prompt: str, is_stream: bool = True) -> bytes:
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.num_output_tokens,
            "temperature": 0,
        }
        if is_stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.ignores_end:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields)


@dataclass(frozen=True)
class Work:
    """A load, or the share of it that one of `num_shares` processes has: every so manieth request.

    start: of `time.monotonic`, which is the same in all processes; None: at once.
    """

    target: Target
    asked: Asked
    prompts: Prompts
    load: Load
    seed: int
    start: float | None = None
    share: int = 0
    num_shares: int = 1

    def numbers(self) -> range:
        return range(self.share, self.load.num_requests, self.num_shares)

    def arrivals(self) -> Iterator[tuple[int, float]]:
        """Own requests of a load with a rate: number, and seconds after the start."""
        assert self.load.rate is not None
        gaps, due = random.Random(self.seed), 0.0
        for number in range(self.load.num_requests):
            if number % self.num_shares == self.share:
                yield number, due
            due += gaps.expovariate(self.load.rate)


def run_load(work: Work, num_processes: int = 1) -> list[Timing]:
    """Of all requests that were sent, in the order of their turn; those given up in the end, too."""
    if num_processes == 1:
        return _run(work)
    start = time.monotonic() + _START_DELAY
    shares = [
        replace(work, start=start, share=share, num_shares=num_processes) for share in range(num_processes)
    ]
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        timings = [timing for part in pool.map(_run, shares, chunksize=1) for timing in part]
    return sorted(timings, key=lambda timing: timing.scheduled)


def _run(work: Work) -> list[Timing]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Sender(work).run())


class _Sender:
    def __init__(self, work: Work) -> None:
        self._work = work
        self._timings: list[Timing] = []

    async def run(self) -> list[Timing]:
        start = self._work.start or time.monotonic()
        await asyncio.sleep(start - time.monotonic())
        try:
            async with asyncio.timeout(start + self._work.load.max_seconds - time.monotonic()):
                if self._work.load.concurrency is None:
                    await self._send_at_rate(start)
                else:
                    await self._send_at_once(self._work.load.concurrency)
        except TimeoutError:
            pass  # what was open then says so itself
        return self._timings

    async def _send_at_rate(self, start: float) -> None:
        async with asyncio.TaskGroup() as group:
            for number, due in self._work.arrivals():
                await asyncio.sleep(start + due - time.monotonic())
                group.create_task(self._send(number, start + due))

    async def _send_at_once(self, concurrency: int) -> None:
        numbers, work = iter(self._work.numbers()), self._work

        async def one_after_the_other() -> None:
            for number in numbers:
                await self._send(number, time.monotonic())

        async with asyncio.TaskGroup() as group:
            for _ in range(work.share, concurrency, work.num_shares):
                group.create_task(one_after_the_other())

    async def _send(self, number: int, scheduled: float) -> None:
        timing = Timing(scheduled, num_asked_tokens=self._work.asked.num_output_tokens)
        self._timings.append(timing)
        body = self._work.asked.body(self._work.prompts.text(number))
        await send_timed(self._work.target, body, timing)
