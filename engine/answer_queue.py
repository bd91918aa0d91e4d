"""What an engine says to each request, kept until the request's reader takes it.

A step brings a token to many requests at once, and each costs its reader work: text, JSON, a write. Readers
are woken one at a time, those of new requests at once, so that the event loop comes to other work in between:
above all to a request that has just arrived, whose way in and out takes several turns of the loop. Who waits
for longer finds more tokens there and takes them together, which costs less.
"""

from __future__ import annotations

import asyncio
from collections import deque

from nybble.engine.errors import (
    EngineDeadError,
    InvalidRequestError,
    NybbleError,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
)
from nybble.engine.messages import (
    AnswerEvent,
    EngineEvent,
    PromptLogprobs,
    RequestAccepted,
    RequestFailed,
    RequestRefused,
    TokenEvent,
)

_MAX_UNTAKEN = 16_384  # events of a request: some megabytes


class AnswerQueues:
    """Of all open requests."""

    def __init__(self) -> None:
        self._queues: dict[str, AnswerQueue] = {}
        self._due: deque[AnswerQueue] = deque()  # to be woken
        self._is_turn_planned = False

    def open(self, request_id: str) -> AnswerQueue:
        queue = self._queues[request_id] = AnswerQueue()
        return queue

    def close(self, request_id: str) -> None:
        """What comes for it from now on is dropped."""
        self._queues.pop(request_id, None)

    def put(self, event: EngineEvent) -> bool:
        """False: so much waits there that nobody takes it. The request has failed, and is to be aborted."""
        queue = self._queues.get(event.request_id)  # None: aborted meanwhile
        if queue is None:
            return True
        if len(queue) < _MAX_UNTAKEN:
            self._put(queue, event)
            return True
        self.close(event.request_id)
        message = f"the answer was ended: {len(queue)} tokens of it were not taken"
        self._put(queue, RequestFailed(request_id=event.request_id, message=message, kind="timeout"))
        return False

    def fail_all(self) -> int:
        """The engine is gone: so the readers are told. Returns how many there are."""
        for queue in self._queues.values():
            self._put(queue, None)
        return len(self._queues)

    def _put(self, queue: AnswerQueue, event: EngineEvent | None) -> None:
        queue.put(event)
        if queue.is_new:
            queue.wake()
        elif not queue.is_due:
            queue.is_due = True
            self._due.append(queue)
            self._plan_turn()

    def _plan_turn(self) -> None:
        if self._due and not self._is_turn_planned:
            self._is_turn_planned = True
            asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._is_turn_planned = False
        self._due.popleft().wake()
        self._plan_turn()


class AnswerQueue:
    """Of one request; one reader takes from it.

    is_finished: the last event was taken; is_new: no token has been; is_due: its reader will be woken.
    """

    def __init__(self) -> None:
        self._events: list[EngineEvent | None] = []  # None: the engine died
        self._waiter: asyncio.Future[None] | None = None
        self.is_finished = False
        self.is_new = True
        self.is_due = False

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: EngineEvent | None) -> None:
        if not (self._events and _is_last(self._events[-1])):
            self._events.append(event)

    def wake(self) -> None:
        self.is_due = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[AnswerEvent]:
        """All that has come since the last time, or else the next.

        Raises:
            NybbleError: what became of the request instead; as `EngineClient.generate`.
        """
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events = self._events
        answered = [event for event in events if isinstance(event, AnswerEvent)]
        self._events = events[len(answered) :]  # one that says what went wrong is the last, for the next time
        if not answered:
            self.is_finished = True
            raise _failure(events[0])
        self.is_new = self.is_new and not isinstance(answered[-1], TokenEvent)
        self.is_finished = _is_last(answered[-1])
        return answered


def _is_last(event: EngineEvent | None) -> bool:
    match event:
        case TokenEvent():
            return event.finish_reason is not None
        case RequestAccepted() | PromptLogprobs():
            return False
    return True


def _failure(event: EngineEvent | None) -> NybbleError:
    match event:
        case RequestRefused() if event.retry_after is not None:
            return QueueFullError(event.message, event.retry_after)
        case RequestRefused():
            return InvalidRequestError(event.message, event.parameter or "")
        case RequestFailed(kind="timeout"):
            return RequestTimeoutError(event.message)
        case RequestFailed():
            return RequestFailedError(event.message)
    return EngineDeadError("the engine stopped before the request was finished; send it again")
