from __future__ import annotations

import pytest

from nybble.engine.errors import (
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
)
from nybble.server.errors import (
    APIError,
    BadRequestError,
    EncodingError,
    ForbiddenError,
    InternalError,
    MethodError,
    NotFoundError,
    SlowRequestError,
    TimedOutError,
    TooLargeError,
    TooManyRequestsError,
    UnauthorizedError,
    UnavailableError,
    UnprocessableError,
    api_error,
)

CASES: list[tuple[type[APIError], int, str]] = [
    (BadRequestError, 400, "invalid_request_error"),
    (UnauthorizedError, 401, "invalid_request_error"),
    (ForbiddenError, 403, "permission_error"),
    (NotFoundError, 404, "invalid_request_error"),
    (MethodError, 405, "invalid_request_error"),
    (SlowRequestError, 408, "invalid_request_error"),
    (TooLargeError, 413, "invalid_request_error"),
    (EncodingError, 415, "invalid_request_error"),
    (UnprocessableError, 422, "invalid_request_error"),
    (TooManyRequestsError, 429, "rate_limit_error"),
    (InternalError, 500, "server_error"),
    (UnavailableError, 503, "server_error"),
    (TimedOutError, 504, "timeout_error"),
]


@pytest.mark.parametrize(("kind", "status", "error_type"), CASES)
def test_status_and_type(kind: type[APIError], status: int, error_type: str) -> None:
    error = kind("it failed")
    assert error.status == status
    assert error.body() == {
        "error": {"message": "it failed", "type": error_type, "param": None, "code": error.code}
    }


def test_every_error_is_tested_here() -> None:
    assert {kind for kind, _, _ in CASES} == set(APIError.__subclasses__())


def test_param_and_code() -> None:
    body = BadRequestError("n: too large", "n", "unsupported_parameter").body()
    assert body["error"]["param"] == "n"
    assert body["error"]["code"] == "unsupported_parameter"


@pytest.mark.parametrize("kind", [BadRequestError, InternalError])
def test_only_an_unavailable_server_says_when_to_come_back(kind: type[APIError]) -> None:
    assert int(UnavailableError("down").headers()["Retry-After"]) > 0
    assert kind("x").headers() == {}


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (3.0, "3"), (3.01, "4")])
def test_retry_after_is_in_whole_seconds_rounded_up(seconds: float, header: str) -> None:
    assert TooManyRequestsError("full", seconds).headers() == {"Retry-After": header}


@pytest.mark.parametrize(
    ("error", "kind", "param"),
    [
        (BadRequestError("bad", "n"), BadRequestError, "n"),
        (InvalidRequestError("bad", "top_p"), BadRequestError, "top_p"),
        (QueueFullError("full", 2.0), TooManyRequestsError, None),
        (RequestTimeoutError("late"), TimedOutError, "timeout"),
        (RequestFailedError("broken"), InternalError, None),
        (EngineDeadError("dead"), UnavailableError, None),
        (ValueError("secret"), InternalError, None),
    ],
)
def test_what_goes_wrong_has_an_answer(error: Exception, kind: type[APIError], param: str | None) -> None:
    answer = api_error(error)
    assert (type(answer), answer.param) == (kind, param)
    assert "secret" not in answer.message
