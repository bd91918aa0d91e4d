"""The gate before every route: without a valid key, nothing but the health route answers."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from nybble.server.access.access import Access
from nybble.server.access.visit import Visit
from nybble.server.errors import APIError
from nybble.server.json_response import error_response

_OPEN_PATHS = frozenset({"/health"})
_VISIT = "nybble.visit"


class KeyGate:
    """ASGI middleware. Only the path that routes are chosen by decides, never a URL made of headers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in _OPEN_PATHS):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._let_in(scope, receive, send)
        else:  # a websocket, which no route takes
            await send({"type": "websocket.close", "code": 1008})

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            visit = self._access.enter(_authorization(scope), _address(scope))
        except APIError as error:
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app({**scope, _VISIT: visit}, receive, send)
        finally:
            self._access.leave(visit)


def visit_of(request: HTTPConnection) -> Visit | None:
    """Whose request it is; None where the server has no keys."""
    visit: Visit | None = request.scope.get(_VISIT)
    return visit


def _authorization(scope: Scope) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""
