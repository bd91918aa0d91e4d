"""The engine's loop, over a runner without a model; the process itself is tested with its client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from engine_harness import Harness, distinct_prompt

from nybble.engine import engine_process
from nybble.engine.channel import Channel, ChannelClosedError
from nybble.engine.engine_process import serve
from nybble.engine.errors import EngineBrokenError
from nybble.engine.messages import (
    Abort,
    EngineFailed,
    EngineStats,
    FromEngine,
    Request,
    RequestAccepted,
    RequestFailed,
    RequestRefused,
    SamplingParams,
    ToEngine,
    TokenEvent,
)


class _Server:
    """The other side: what it got but statistics and what was accepted, and how `serve` ended."""

    def __init__(self, harness: Harness) -> None:
        engine_side, server_side = socket.socketpair()
        self._socket = server_side
        self._channel: Channel[Any] = Channel(server_side, FromEngine)
        self._thread = threading.Thread(target=self._serve, args=(harness, engine_side))
        self.end: Exception | None = None
        self.accepted: list[str] = []
        self._thread.start()

    def _serve(self, harness: Harness, sock: socket.socket) -> None:
        with sock:
            try:
                serve(harness.engine, Channel(sock, ToEngine))
            except (ChannelClosedError, EngineBrokenError) as error:
                self.end = error

    def send(self, *messages: object) -> None:
        self._channel.send(messages)

    def receive_until(self, is_last: Callable[[Any], bool]) -> list[Any]:
        messages: list[Any] = []
        while not messages or not is_last(messages[-1]):
            messages += filter(self._is_answer, self._channel.receive())
        return messages

    def _is_answer(self, message: Any) -> bool:
        if isinstance(message, RequestAccepted):
            self.accepted.append(message.request_id)
        return not isinstance(message, EngineStats | RequestAccepted)

    def close(self) -> None:
        self._socket.close()
        self._thread.join()


@contextmanager
def _serving(harness: Harness) -> Iterator[_Server]:
    server = _Server(harness)
    try:
        yield server
    finally:
        server.close()


def _request(name: str, max_tokens: int = 3, **fields: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(
        request_id=name, prompt_token_ids=distinct_prompt(9, ord(name)), sampling=sampling, **fields
    )


def _ends(name: str) -> Callable[[Any], bool]:
    return lambda message: (
        message.request_id == name and not (isinstance(message, TokenEvent) and message.finish_reason is None)
    )


def test_tokens_until_the_end() -> None:
    with _serving(Harness()) as server:
        server.send(_request("a"))
        events = server.receive_until(_ends("a"))
        assert [event.finish_reason for event in events] == [None, None, "length"]
        assert server.accepted == ["a"]
    assert isinstance(server.end, ChannelClosedError)


def test_refusals_say_why() -> None:
    with _serving(Harness(max_waiting=0)) as server:
        server.send(_request("a"))
        (full,) = server.receive_until(_ends("a"))
        assert server.accepted == []
    assert isinstance(full, RequestRefused) and full.retry_after == 5.0 and full.parameter is None
    with _serving(Harness()) as server:
        server.send(_request("a", max_tokens=10_000))
        (invalid,) = server.receive_until(_ends("a"))
    assert isinstance(invalid, RequestRefused) and invalid.parameter == "max_tokens"
    assert invalid.retry_after is None


def test_whatever_fails_at_a_request_is_answered_to_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    add = harness.engine.add

    def fail_at_b(request: Request) -> None:
        if request.request_id == "b":
            raise ZeroDivisionError
        add(request)

    monkeypatch.setattr(harness.engine, "add", fail_at_b)
    with _serving(harness) as server:
        server.send(_request("a"), _request("b"))
        first, *others = server.receive_until(_ends("a"))
    assert first == RequestFailed(
        request_id="b", message="the engine failed at this request: ZeroDivisionError", kind="internal"
    )
    assert {event.request_id for event in others} == {"a"}


def test_a_failed_step_is_answered_and_the_loop_goes_on() -> None:
    harness = Harness()
    harness.runner.fault = lambda plan: RuntimeError("boom") if plan.chunks[0].request_id == "a" else None
    with _serving(harness) as server:
        server.send(_request("a"))
        (failed,) = server.receive_until(_ends("a"))
        assert failed.kind == "internal" and "RuntimeError" in failed.message
        server.send(_request("b"))
        assert len(server.receive_until(_ends("b"))) == 3


def test_an_engine_that_cannot_go_on_says_so_and_ends() -> None:
    harness = Harness(max_num_seqs=1)
    harness.runner.fault = lambda plan: RuntimeError("boom")
    harness.runner.has_survived = False
    with _serving(harness) as server:
        server.send(_request("a"), _request("b"))
        failed, last = server.receive_until(lambda message: isinstance(message, EngineFailed))
        assert isinstance(failed, RequestFailed) and failed.request_id == "a"
        assert last.message == "a step failed and the model cannot be run again"
    assert isinstance(server.end, EngineBrokenError)


def test_an_abort_takes_effect_before_the_next_step() -> None:
    harness = Harness()
    with _serving(harness) as server:
        server.send(_request("a", max_tokens=300))
        server.receive_until(lambda message: isinstance(message, TokenEvent))
        server.send(Abort(request_id="a"), _request("b"))
        server.receive_until(_ends("b"))
    assert not harness.engine.has_work
    aborted = next(n for n, plan in enumerate(harness.runner.plans) if plan.chunks[0].request_id == "b")
    assert all(chunk.request_id == "b" for plan in harness.runner.plans[aborted:] for chunk in plan.chunks)


@pytest.mark.parametrize(("quiet_time", "is_checked"), [(60.0, False), (0.01, True)])
def test_the_state_is_checked_when_no_request_has_come_for_a_while(
    monkeypatch: pytest.MonkeyPatch, quiet_time: float, is_checked: bool
) -> None:
    monkeypatch.setattr(engine_process, "_QUIET_TIME", quiet_time)
    harness, checked = Harness(), threading.Event()
    monkeypatch.setattr(harness.engine, "check", checked.set)
    with _serving(harness) as server:
        for name in "ab":
            server.send(_request(name))
            server.receive_until(_ends(name))
        assert checked.wait(10 if is_checked else 0) == is_checked
        server.send(_request("c"))
        assert len(server.receive_until(_ends("c"))) == 3
