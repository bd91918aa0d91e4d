"""What nobody foresaw: answered with status 500, and logged without anything of the request."""

from __future__ import annotations

import logging
import traceback

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

logger = logging.getLogger("nybble.server")


class AnswerFaults:
    """ASGI middleware. Where an answer has begun, its connection is cut."""

    def __init__(self, app: ASGIApp, answer: ExceptionHandler) -> None:
        """answer: as starlette's handlers of exceptions."""
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noting_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception as error:
            log_fault(error, "a request failed")
            if has_begun or scope["type"] != "http":
                raise BrokenAnswerError from None
            response = await self._answer(Request(scope), error)  # type: ignore[arg-type, misc]
            assert isinstance(response, Response)
            await response(scope, receive, send)


class BrokenAnswerError(Exception):
    """An answer could not be finished. The HTTP library closes its connection."""


def log_fault(error: BaseException, what: str) -> None:
    """Which exceptions, and where; their messages, which may quote a request, at debug level only."""
    logger.error("%s: %s", what, _without_messages(error))
    logger.debug("the same with its messages", exc_info=error)


def _without_messages(error: BaseException) -> str:
    """The chain of exceptions, the last one first, each with the lines of code that it went through."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    text = type(error).__name__ + "\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip()
    return f"{text}\nafter {_without_messages(cause)}" if cause else text
