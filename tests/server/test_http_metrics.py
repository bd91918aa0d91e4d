from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from asgi_exchange import Exchange
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import Pause, ScriptedEngine
from starlette.applications import Starlette

from nybble.server import app as app_module
from nybble.server.app import create_app
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}

Counts = dict[tuple[str, ...], float]


async def ask(app: Starlette, method: str, path: str, **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **options)


async def counts(app: Starlette, name: str) -> Counts:
    """By route, method and, where there is one, status; without what `/metrics` counts of itself."""
    text = (await ask(app, "GET", "/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == name and labels["route"] != "/metrics":
                values = (labels["route"], labels["method"], labels.get("status"))
                found[tuple(value for value in values if value is not None)] = sample.value
    return found


def test_answers_by_route_method_and_status(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client makes up becomes no label."""

    def fail(*_: object) -> None:
        raise ValueError("boom")

    async def scenario() -> None:
        app = create_app(ScriptedEngine([65]), model, ServerConfig())
        for path, method in (
            *[("/v1/models", "GET")] * 2, ("/v1/models/tiny", "GET"), ("/v1/models/other", "GET"),
            (CHAT, "GET"), ("/a", "GET"), ("/b?/v1/models", "GET"), ("/a", "BREW"), ("//v1/models", "GET"),
        ):  # fmt: skip
            await ask(app, method, path)
        await ask(app, "POST", CHAT, json=BODY)
        await ask(app, "POST", CHAT, json={})
        monkeypatch.setattr(app_module, "parse_chat_request", fail)
        await ask(app, "POST", CHAT, json=BODY)
        assert await counts(app, "nybble:http_requests_total") == {
            ("/v1/models", "GET", "200"): 2,
            ("/v1/models/{name:path}", "GET", "200"): 1,
            ("/v1/models/{name:path}", "GET", "404"): 1,
            (CHAT, "GET", "405"): 1,
            ("other", "GET", "404"): 3,
            ("other", "other", "404"): 1,
            (CHAT, "POST", "200"): 1,
            (CHAT, "POST", "400"): 1,
            (CHAT, "POST", "500"): 1,
        }

    asyncio.run(scenario())


def test_bytes_of_bodies(model: ServedModel) -> None:
    async def scenario() -> None:
        app = create_app(ScriptedEngine([65]), model, ServerConfig())
        asked = [{"json": BODY}, {"json": BODY | {"stream": True}}, {"content": b"\xff" * 1000}]
        answers = [await ask(app, "POST", CHAT, **options) for options in asked]
        received = sum(len(answer.request.content) for answer in answers)
        assert await counts(app, "nybble:http_received_bytes_total") == {(CHAT, "POST"): received}
        sent = sum(len(answer.content) for answer in answers)
        assert await counts(app, "nybble:http_sent_bytes_total") == {(CHAT, "POST"): sent}

    asyncio.run(scenario())


def test_what_is_in_flight(model: ServedModel) -> None:
    async def scenario() -> None:
        pause = Pause()
        app = create_app(ScriptedEngine([65, pause, 66]), model, ServerConfig())
        streams = [Exchange(app, BODY | {"stream": True}) for _ in range(2)]
        tasks = [stream.start() for stream in streams]
        await pause.reached.wait()
        assert await counts(app, "nybble:http_requests_in_flight") == {(CHAT, "POST"): 2}
        streams[0].disconnect()
        await tasks[0]
        assert await counts(app, "nybble:http_requests_in_flight") == {(CHAT, "POST"): 1}
        pause.resumed.set()
        await tasks[1]
        assert await counts(app, "nybble:http_requests_in_flight") == {(CHAT, "POST"): 0}

    asyncio.run(asyncio.wait_for(scenario(), 30))
