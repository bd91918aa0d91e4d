from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi_exchange import Exchange
from scripted_engine import Pause, ScriptedEngine
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Message

from nybble.server.access.access import Access
from nybble.server.access.api_keys import APIKey
from nybble.server.access.prices import Prices
from nybble.server.access.usage_ledger import UsageLedger, day_of
from nybble.server.app import create_app
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def key(name: str, **limits: Any) -> APIKey:
    """Its secret is its name."""
    return APIKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **limits)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[UsageLedger]:
    with closing(UsageLedger(tmp_path / "use.jsonl")) as ledger:
        yield ledger


@pytest.fixture
def access(ledger: UsageLedger) -> Access:
    keys = [key("ann", concurrent_requests=1), key("bob"), key("off", enabled=False)]
    return Access(keys, ledger, Prices(), clock=lambda: 0.0, wall_clock=lambda: 86400.0)


def ask(app: Starlette, method: str, url: str, name: str = "", **options: Any) -> httpx.Response:
    headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {name}"} if name else {})

    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, url, headers=headers, **options)

    return asyncio.run(request())


def routes(app: Starlette) -> list[str]:
    return [route.path for route in app.routes if isinstance(route, Route)]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "DELETE", "CONNECT"])
def test_without_a_key_no_route_answers_but_health(model: ServedModel, access: Access, method: str) -> None:
    engine = ScriptedEngine([65])
    app = create_app(engine, model, ServerConfig(), access)
    unknown = [
        "/",
        "/nonsense",
        "/health/",
        "/health/x",
        "//health",
        "/HEALTH",
        "/health%2f",
    ]
    for path in {*routes(app), *unknown} - {"/health"}:
        for name in ("", "carl"):
            response = ask(app, method, path, name)
            assert response.status_code == 401, path
            if method != "HEAD":
                assert response.json()["error"]["code"] == "invalid_api_key"
    assert engine.requests == []
    assert ask(app, "GET", "/health").status_code == 200
    assert ask(app, "GET", "/nonsense", "bob").status_code == 404


def test_a_host_header_opens_nothing(model: ServedModel, access: Access) -> None:
    """CVE-2026-48710: a path check on a URL that is made of the Host header."""
    app = create_app(ScriptedEngine([]), model, ServerConfig(), access)
    for host in ("test/health?", "test/health#", "/health?x=", "health", "a:b:c", ""):
        assert ask(app, "GET", "/v1/models", headers={"Host": host}).status_code == 401
        assert ask(app, "GET", "/v1/models", "bob", headers={"Host": host}).status_code == 200


def test_a_disabled_key_is_403(model: ServedModel, access: Access) -> None:
    response = ask(create_app(ScriptedEngine([]), model, ServerConfig(), access), "GET", "/v1/models", "off")
    assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")


def test_a_websocket_is_refused(model: ServedModel, access: Access) -> None:
    app = create_app(ScriptedEngine([]), model, ServerConfig(), access)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    asyncio.run(app({"type": "websocket", "path": "/health", "headers": []}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize("is_stream", [True, False])
def test_keys_have_turns_and_prefix_caches_of_their_own(
    model: ServedModel, access: Access, is_stream: bool
) -> None:
    engine = ScriptedEngine([65])
    app = create_app(engine, model, ServerConfig(), access)
    for name in ("ann", "bob"):
        for salt in ({}, {"cache_salt": "x"}, {"cache_salt": "bob:"}):
            response = ask(app, "POST", CHAT, name, json=BODY | salt | {"stream": is_stream})
            assert response.status_code == 200
    assert [request.tenant for request in engine.requests] == ["ann"] * 3 + ["bob"] * 3
    assert len({request.cache_salt for request in engine.requests}) == 6


@pytest.mark.parametrize("is_stream", [True, False])
def test_completions_are_a_keys_own_and_charged(
    model: ServedModel, access: Access, ledger: UsageLedger, is_stream: bool
) -> None:
    engine = ScriptedEngine([65])
    app = create_app(engine, model, ServerConfig(), access)
    for name in ("ann", "bob"):
        body = {"model": "tiny", "prompt": ["hi", "you"], "stream": is_stream}
        assert ask(app, "POST", "/v1/completions", name, json=body).status_code == 200
    assert [request.tenant for request in engine.requests] == ["ann"] * 2 + ["bob"] * 2
    assert {request.cache_salt for request in engine.requests} == {"ann:", "bob:"}
    assert {name: use.tokens for name, use in ledger.sums(1).items()} == {"ann": 7, "bob": 7}


def test_answers_are_replayed_to_their_own_key_only(model: ServedModel, access: Access) -> None:
    """The model spelled "hi" as two tokens; who did not get that answer is tokenized as usual."""
    engine = ScriptedEngine([*b"hello", model.stop_token_ids[0]])
    app = create_app(engine, model, ServerConfig(), access)
    usual = model.tokenizer.encode("hello")
    assert len(usual) < 5
    assert ask(app, "POST", CHAT, "ann", json=BODY).status_code == 200
    turns = [*BODY["messages"], {"role": "assistant", "content": "hello"}, {"role": "user", "content": "x"}]
    for name in ("ann", "bob"):
        assert ask(app, "POST", CHAT, name, json=BODY | {"messages": turns}).status_code == 200
    own, others = (request.prompt_token_ids for request in engine.requests[1:])
    assert len(own) == len(others) + 5 - len(usual)


@pytest.mark.parametrize("is_stream", [True, False])
def test_what_is_used_is_charged(
    model: ServedModel, access: Access, ledger: UsageLedger, is_stream: bool
) -> None:
    """A prompt that several choices share counts once, as in the usage of the answer."""
    app = create_app(ScriptedEngine([65, 66], num_cached_tokens=2), model, ServerConfig(), access)
    usage = ask(app, "POST", CHAT, "bob", json=BODY | {"n": 3}).json()["usage"]
    (use,) = ledger.sums(day_of(86400.0)).values()
    assert (use.tokens, use.cost) == (usage["total_tokens"], pytest.approx(usage["estimated_cost"]))
    assert usage["completion_tokens"] == 6


def test_an_open_request_counts_until_its_client_goes(
    model: ServedModel, access: Access, ledger: UsageLedger
) -> None:
    async def scenario() -> None:
        pause = Pause()
        engine = ScriptedEngine([65, pause, 66])
        app = create_app(engine, model, ServerConfig(), access)
        headers = [(b"authorization", b"Bearer ann")]
        open_one = Exchange(app, BODY | {"stream": True}, headers=headers)
        task = open_one.start()
        await pause.reached.wait()
        refused = Exchange(app, BODY, headers=headers)
        await refused.start()
        assert refused.status == 429
        assert dict(refused.messages[0]["headers"])[b"retry-after"] == b"1"
        open_one.disconnect()
        await task
        assert len(engine.aborts) == 1
        allowed = Exchange(
            create_app(ScriptedEngine([65]), model, ServerConfig(), access), BODY, headers=headers
        )
        await allowed.start()
        assert allowed.status == 200

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert ledger.sums(1)["ann"].tokens == 2 * (4 + 1)  # of the one that was aborted, too
