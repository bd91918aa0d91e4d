from __future__ import annotations

import asyncio

import httpx
import pytest
from scripted_engine import ScriptedEngine

from nybble.server.app import create_app
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig

CHAT = "/v1/chat/completions"


def _refusal(model: ServedModel, method: str, path: str) -> tuple[httpx.Response, str]:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(ScriptedEngine([]), model, ServerConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path)

    response = asyncio.run(asyncio.wait_for(ask(), timeout=30))
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
    return response, error["message"]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", CHAT),
        ("/v1/v1/chat/completions", CHAT),
        ("/v1/chat/completions/", CHAT),
        ("/v1/health", "/health"),
        ("/v1/tokenize", "/tokenize"),
        ("/models", "/v1/models"),
        ("/v1/embeddings", None),
        ("/%0a%22", None),
    ],
)
def test_a_route_that_is_not_there(model: ServedModel, path: str, meant: str | None) -> None:
    response, message = _refusal(model, "POST", path)
    assert response.status_code == 404
    said, _, hint = message.partition("; ")
    assert said == f"no such route: POST {httpx.URL(path).path if path.startswith('/%') else path}"
    assert hint == (f"did you mean {meant}?" if meant else "")


def test_a_long_path_is_not_repeated(model: ServedModel) -> None:
    _, message = _refusal(model, "GET", "/" + "a" * 5000)
    assert message == "no such route: GET /" + "a" * 99


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, {"POST"}),
        ("PUT", CHAT, {"POST"}),
        ("DELETE", CHAT, {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
    ],
)
def test_a_method_that_the_route_lacks(model: ServedModel, method: str, path: str, allowed: set[str]) -> None:
    response, message = _refusal(model, method, path)
    assert response.status_code == 405
    said, _, takes = message.partition("; it takes ")
    assert said == f"no such route: {method} {path}"
    assert set(takes.split(", ")) == allowed == set(response.headers["allow"].split(", "))
