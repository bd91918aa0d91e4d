"""What a request can be answered with instead of a result, in OpenAI's shape.

    APIError
    ├── BadRequestError       400  malformed, out of range, unsupported, too long for the context
    ├── UnauthorizedError     401  no API key, or an unknown one
    ├── ForbiddenError        403  an API key that is disabled
    ├── NotFoundError         404  no such model or route
    ├── MethodError           405  a route that exists, another method
    ├── SlowRequestError      408  the body did not come in time
    ├── TooLargeError         413  body over the limit
    ├── EncodingError         415  a body that is compressed
    ├── UnprocessableError    422  well-formed, but the chat template refuses it
    ├── TooManyRequestsError  429  too many requests wait, or a limit of the API key is reached
    ├── InternalError         500  our fault
    ├── UnavailableError      503  the engine is down
    └── TimedOutError         504  the request's time was over

The body is {"error": {"message", "type", "param", "code"}}; `param` names the field at fault.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from nybble.engine.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
)


class APIError(Exception):
    status: ClassVar[int]
    kind: ClassVar[str] = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def headers(self) -> dict[str, str]:
        return {}


class BadRequestError(APIError):
    status = 400


class UnauthorizedError(APIError):
    status = 401

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class ForbiddenError(APIError):
    status = 403
    kind = "permission_error"


class NotFoundError(APIError):
    status = 404


class MethodError(APIError):
    status = 405


class SlowRequestError(APIError):
    status = 408

    def headers(self) -> dict[str, str]:
        return {"Connection": "close"}


class TooLargeError(APIError):
    status = 413


class EncodingError(APIError):
    status = 415


class UnprocessableError(APIError):
    status = 422


class TooManyRequestsError(APIError):
    """`retry_after`: seconds."""

    status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, retry_after: float = 1.0, code: str = "queue_full") -> None:
        super().__init__(message, code=code)
        self._retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(math.ceil(self._retry_after))}


class InternalError(APIError):
    status = 500
    kind = "server_error"


class UnavailableError(APIError):
    status = 503
    kind = "server_error"

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "5"}


class TimedOutError(APIError):
    status = 504
    kind = "timeout_error"


def api_error(error: Exception) -> APIError:
    """The one mapping from what went wrong to what the client is told."""
    match error:
        case APIError():
            return error
        case ContextLengthError():
            return BadRequestError(str(error), error.parameter, "context_length_exceeded")
        case InvalidRequestError():
            return BadRequestError(str(error), error.parameter)
        case QueueFullError():
            return TooManyRequestsError(str(error), error.retry_after)
        case RequestTimeoutError():
            return TimedOutError(str(error), "timeout", "timeout")
        case RequestFailedError():
            return InternalError(str(error), code="engine_error")
        case EngineDeadError():
            return UnavailableError(str(error), code="engine_dead")
    return InternalError("the server failed to handle the request")
