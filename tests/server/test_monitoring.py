from __future__ import annotations

import asyncio

import httpx
import pytest
from scripted_engine import ScriptedEngine

from nybble.engine.errors import RequestFailedError
from nybble.server.app import create_app
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig


def get(engine: ScriptedEngine, model: ServedModel, path: str) -> httpx.Response:
    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(engine, model, ServerConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(request())


def test_ready(model: ServedModel) -> None:
    engine = ScriptedEngine([65, 66])
    response = get(engine, model, "/ready")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert engine.num_emitted == 2


def test_alive_is_not_ready(model: ServedModel) -> None:
    engine = ScriptedEngine([RequestFailedError("boom")])
    assert get(engine, model, "/health").status_code == 200
    response = get(engine, model, "/ready")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("is_alive", [True, False])
def test_metrics(model: ServedModel, is_alive: bool) -> None:
    response = get(ScriptedEngine([], is_alive=is_alive), model, "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert f'nybble:engine_up{{model_name="tiny"}} {float(is_alive)}' in response.text
