"""Answers in JSON."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from nybble.server.errors import APIError

_json = msgspec.json.Encoder()


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_json.encode(content), status, headers, media_type="application/json")


def error_response(error: APIError) -> Response:
    return json_response(error.body(), error.status, error.headers())
