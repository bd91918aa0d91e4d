from __future__ import annotations

import asyncio
import logging

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.server.faults import AnswerFaults, BrokenAnswerError, log_fault

SECRET = "a7f3"


async def answer(request: Request, error: Exception) -> Response:
    return Response(type(error).__name__, 500)


def sent(app: ASGIApp, kind: str = "http") -> list[Message]:
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    asyncio.run(AnswerFaults(app, answer)({"type": kind, "headers": [], "method": "GET"}, receive, send))
    return messages


def test_a_fault_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError(SECRET)

    start, body = sent(fail)
    assert (start["status"], body["body"]) == (500, b"KeyError")
    assert "a request failed: KeyError" in caplog.text and "in fail" in caplog.text


def test_an_answer_that_has_begun_is_cut_and_its_error_told_nobody() -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError(SECRET)

    with pytest.raises(BrokenAnswerError) as caught:
        sent(fail)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None


def test_no_fault_no_change(caplog: pytest.LogCaptureFixture) -> None:
    assert len(sent(Response("fine"))) == 2
    assert caplog.text == ""


def test_of_a_chain_all_kinds_and_lines_but_no_message_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def outer() -> None:
        try:
            {}[SECRET]
        except KeyError as error:
            raise ValueError(SECRET) from error

    caplog.set_level(logging.INFO, "nybble.server")
    try:
        outer()
    except ValueError as error:
        log_fault(error, "what")
    text = caplog.text
    assert text.index("what: ValueError") < text.index("in outer") < text.index("after KeyError")
    assert SECRET not in text
    caplog.set_level(logging.DEBUG, "nybble.server")
    log_fault(ValueError(SECRET), "what")
    assert SECRET in caplog.text


def test_a_context_that_was_suppressed_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    try:
        try:
            raise KeyError
        except KeyError:
            raise ValueError from None
    except ValueError as error:
        log_fault(error, "what")
    assert "KeyError" not in caplog.records[0].message
