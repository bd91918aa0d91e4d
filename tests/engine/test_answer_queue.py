from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from nybble.engine.answer_queue import AnswerQueue, AnswerQueues
from nybble.engine.errors import (
    EngineDeadError,
    InvalidRequestError,
    NybbleError,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
)
from nybble.engine.messages import EngineEvent, RequestAccepted, RequestFailed, RequestRefused, TokenEvent


def _drive(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def _accepted(name: str) -> RequestAccepted:
    return RequestAccepted(request_id=name)


def _token(name: str, token_id: int, is_last: bool = False) -> TokenEvent:
    return TokenEvent(
        request_id=name,
        token_id=token_id,
        logprobs=None,
        finish_reason="stop" if is_last else None,
        num_cached_tokens=0,
    )


def test_what_has_come_is_taken_together_and_in_order() -> None:
    async def work() -> None:
        queues = AnswerQueues()
        a, b = queues.open("a"), queues.open("b")
        waiting = asyncio.create_task(a.take())
        await asyncio.sleep(0)
        for event in (_accepted("a"), _token("b", 1), _token("a", 2), _token("a", 3)):
            queues.put(event)
        assert await waiting == [_accepted("a"), _token("a", 2), _token("a", 3)]
        assert await b.take() == [_token("b", 1)]
        queues.put(_token("a", 4, is_last=True))
        assert not a.is_finished
        assert await a.take() == [_token("a", 4, is_last=True)]
        assert a.is_finished and not b.is_finished

    _drive(work())


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (RequestRefused(request_id="a", message="m", parameter="prompt"), InvalidRequestError),
        (RequestRefused(request_id="a", message="m", retry_after=0.0), QueueFullError),
        (RequestFailed(request_id="a", message="m", kind="timeout"), RequestTimeoutError),
        (RequestFailed(request_id="a", message="m", kind="internal"), RequestFailedError),
        (None, EngineDeadError),
    ],
)
def test_a_failure_is_raised_after_the_tokens_before_it(
    event: EngineEvent | None, error: type[NybbleError]
) -> None:
    async def work() -> None:
        queues = AnswerQueues()
        queue = queues.open("a")
        queues.put(_token("a", 1))
        if event is None:
            assert queues.fail_all() == 1
        else:
            queues.put(event)
        assert await queue.take() == [_token("a", 1)] and not queue.is_finished
        with pytest.raises(error):
            await queue.take()
        assert queue.is_finished

    _drive(work())


def test_an_answer_that_is_complete_stays_so_when_the_engine_dies() -> None:
    async def work() -> None:
        queues = AnswerQueues()
        queue = queues.open("a")
        queues.put(_token("a", 1, is_last=True))
        queues.fail_all()
        assert await queue.take() == [_token("a", 1, is_last=True)]
        assert queue.is_finished

    _drive(work())


def test_what_comes_for_nobody_is_dropped() -> None:
    async def work() -> None:
        queues = AnswerQueues()
        queue = queues.open("a")
        queues.close("a")
        queues.put(_token("a", 1))
        queues.put(_token("never", 1))
        assert len(queue) == 0 and queues.fail_all() == 0

    _drive(work())


def test_a_reader_that_gave_up_waiting_can_come_back() -> None:
    async def work() -> None:
        queues = AnswerQueues()
        queue = queues.open("a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.take(), 0.01)
        queues.put(_token("a", 1))
        await asyncio.sleep(0.01)  # its turn passes
        assert await queue.take() == [_token("a", 1)]
        waiting = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        queues.put(_token("a", 2))
        assert await waiting == [_token("a", 2)]

    _drive(work())


async def _read(name: str, queue: AnswerQueue, log: list[str]) -> None:
    while not queue.is_finished:
        await queue.take()
        log.append(name)


def test_other_work_gets_its_turn_between_readers_but_new_ones_wait_for_none() -> None:
    async def work() -> None:
        queues, log = AnswerQueues(), list[str]()
        names = [str(n) for n in range(40)]
        readers = [asyncio.create_task(_read(name, queues.open(name), log)) for name in names]
        await asyncio.sleep(0)
        for name in names:
            queues.put(_token(name, 1))
        await asyncio.sleep(0)
        assert log == names
        readers.append(asyncio.create_task(_read("new", queues.open("new"), log)))
        await asyncio.sleep(0)
        for name in (*names, "new"):
            queues.put(_token(name, 2, is_last=True))
        while not all(reader.done() for reader in readers):
            before = len(log)
            await asyncio.sleep(0)
            assert len([name for name in log[before:] if name != "new"]) <= 1
        assert log == [*names, "new", *names]

    _drive(work())
