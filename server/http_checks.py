"""Requests that are refused for how they are written, before anybody asks what they want."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from nybble.server.errors import APIError, BadRequestError, EncodingError, ForbiddenError
from nybble.server.json_response import error_response


class CheckRequests:
    """ASGI middleware. It closes the connection of what it refuses: where the body ends is in doubt."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = _error(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            response = error_response(error)
            response.headers["Connection"] = "close"
            await response(scope, receive, send)


def _error(scope: Scope) -> APIError | None:
    headers = dict(scope["headers"])
    if b"content-length" in headers and b"transfer-encoding" in headers:
        # A proxy may go by the one and we by the other: what is a body to it may be a request to us.
        return BadRequestError(
            "a request with both Content-Length and Transfer-Encoding", code="invalid_http"
        )
    encoding = headers.get(b"content-encoding", b"identity").lower()
    if encoding != b"identity":  # a body that is unpacked may become any size
        shown = encoding[:40].decode("latin-1")
        message = f"Content-Encoding: {shown!r} is not supported: send the body as it is"
        return EncodingError(message, code="unsupported_encoding")
    if headers.get(b"sec-fetch-site") == b"cross-site" and scope["method"] not in ("GET", "HEAD"):
        # A page that somebody looks at may send requests to a server that only their machine reaches.
        return ForbiddenError("sent by a page of another site", code="cross_site")
    return None
