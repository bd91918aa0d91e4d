from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from scripted_engine import ScriptedEngine
from starlette.routing import Route

from nybble.server.app import create_app
from nybble.server.openapi import OPERATIONS, Operation, describe_api
from nybble.server.requests.schemas import ErrorAnswer
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT | {"logprobs": True, "top_logprobs": 1},
    "/v1/completions": {"model": "tiny", "prompt": "hi", "logprobs": 1},
    "/tokenize": {"prompt": "hi", "return_token_strs": True},
    "/detokenize": {"tokens": [104]},
}


def _ask(model: ServedModel, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(ScriptedEngine([65, 66]), model, ServerConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path.format(name="tiny"), json=body)

    return asyncio.run(asyncio.wait_for(ask(), timeout=30))


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (one for key, one in value.items() if key == "$ref")
        for one in value.values():
            yield from _references(one)
    elif isinstance(value, list):
        for one in value:
            yield from _references(one)


def test_it_is_served(model: ServedModel) -> None:
    assert _ask(model, "GET", "/openapi.json").json() == json.loads(json.dumps(describe_api()))


def test_every_reference_leads_somewhere() -> None:
    document = describe_api()
    names = {reference.removeprefix("#/components/schemas/") for reference in _references(document)}
    assert names == set(document["components"]["schemas"])


def test_the_types_are_the_decoders() -> None:
    schema = describe_api()["components"]["schemas"]["ChatCompletionRequest"]
    assert schema["required"] == ["messages", "model"] or schema["required"] == ["model", "messages"]
    (temperature, _) = schema["properties"]["temperature"]["anyOf"]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 2)


def test_routes_that_it_describes_exist(model: ServedModel) -> None:
    app = create_app(ScriptedEngine([]), model, ServerConfig())
    paths = {route.path.replace(":path", "") for route in app.routes if isinstance(route, Route)}
    assert {operation.path for operation in OPERATIONS} <= paths
    assert {path for path in paths if path.startswith("/v1/")} <= {operation.path for operation in OPERATIONS}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
def test_answers_have_the_described_type(model: ServedModel, operation: Operation) -> None:
    """Nothing missing, nothing of another type, nothing that is not described."""
    response = _ask(model, operation.method, operation.path, BODIES.get(operation.path))
    assert response.status_code == 200
    _check(response.json(), operation.answer)
    if operation.chunk is not None:
        body = BODIES[operation.path] | {"stream": True, "stream_options": {"include_usage": True}}
        *events, _, _ = _ask(model, operation.method, operation.path, body).content.split(b"\n\n")
        assert len(events) > 2
        for event in events:
            _check(json.loads(event.removeprefix(b"data: ")), operation.chunk)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
def test_so_have_errors(model: ServedModel, operation: Operation) -> None:
    response = _ask(model, operation.method, "/v1/models/none" if "{" in operation.path else operation.path)
    if operation.request is not None or "{" in operation.path:
        assert response.status_code in (400, 404)
        _check(response.json(), ErrorAnswer)


def _check(answer: Any, kind: type) -> None:
    """Decode strictly and encode again: what comes out is what went in, but for order and defaults."""
    decoded = msgspec.convert(answer, kind)
    again = msgspec.to_builtins(decoded)
    assert _without_absent(answer, again) == again


def _without_absent(answer: Any, again: Any) -> Any:
    """Keys that the type leaves out when they hold their default may stand in the answer."""
    if isinstance(answer, dict) and isinstance(again, dict):
        assert again.keys() <= answer.keys()
        extra = answer.keys() - again.keys()
        assert all(answer[key] is None or answer[key] == [] for key in extra), extra
        return {key: _without_absent(answer[key], again[key]) for key in again}
    if isinstance(answer, list) and isinstance(again, list):
        return [_without_absent(*pair) for pair in zip(answer, again, strict=True)]
    return answer
