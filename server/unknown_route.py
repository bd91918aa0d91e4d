"""What a client is told that asked for a route or a method that is not there: most often a wrong base URL."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from nybble.server.errors import APIError, BadRequestError, MethodError, NotFoundError

_MAX_SHOWN = 100  # characters of a path


def route_error(request: Request, error: HTTPException) -> APIError:
    """The answer to what routing refuses."""
    path = str(request.scope["path"])
    asked = f"{request.method} {path[:_MAX_SHOWN]}"
    match error.status_code:
        case 404:
            near = _near(path, request)
            return NotFoundError(f"no such route: {asked}" + (f"; did you mean {near}?" if near else ""))
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            return MethodError(f"no such route: {asked}; it takes {allowed}")
    return BadRequestError(error.detail)


def _near(path: str, request: Request) -> str | None:
    """A route that differs by /v1 or slashes only."""
    bare = "/" + path.strip("/")
    wanted = {bare, f"/v1{bare}", bare.removeprefix("/v1"), bare.replace("/v1/v1", "/v1")}
    routes = (route.path for route in request.app.routes if isinstance(route, Route))
    return next((route for route in routes if route in wanted), None)
