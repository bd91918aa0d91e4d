from __future__ import annotations

import asyncio
import threading

import pytest

from nybble.server.errors import TimedOutError
from nybble.server.work_pool import WorkPool


def test_results_and_errors() -> None:
    async def scenario() -> None:
        pool = WorkPool(2, 30)
        assert await pool.run(lambda: 1 + 1) == 2
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 // 0)

    asyncio.run(scenario())


def test_what_is_more_waits_and_the_loop_goes_on() -> None:
    async def scenario() -> None:
        pool, go = WorkPool(1, 30), threading.Event()
        done: list[int] = []

        def work(number: int) -> None:
            go.wait(30)
            done.append(number)

        tasks = [asyncio.create_task(pool.run(lambda n=n: work(n))) for n in range(3)]  # type: ignore[misc]
        for _ in range(10):
            await asyncio.sleep(0)
        assert done == []
        go.set()
        await asyncio.gather(*tasks)
        assert done == [0, 1, 2]

    asyncio.run(scenario())


def test_what_is_late_is_given_up() -> None:
    async def scenario() -> None:
        pool, go, begun = WorkPool(1, 0.05), threading.Event(), list[int]()
        late = asyncio.create_task(pool.run(lambda: go.wait(30)))
        never = asyncio.create_task(pool.run(lambda: begun.append(1)))
        for task in (late, never):
            with pytest.raises(TimedOutError, match=r"longer than 0\.05 s"):
                await task
        go.set()
        assert await WorkPool(1, 30).run(lambda: 5) == 5
        assert begun == []

    asyncio.run(scenario())
