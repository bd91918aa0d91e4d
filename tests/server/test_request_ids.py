from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nybble.server.request_ids import RequestIds


async def _empty(request: Request) -> Response:
    return Response()


def _answered_id(*given: str) -> str:
    async def ask() -> httpx.Response:
        app = RequestIds(Starlette(routes=[Route("/", _empty)]))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/", headers=[("x-request-id", one) for one in given])

    (answered,) = asyncio.run(ask()).headers.get_list("x-request-id")
    return answered


@pytest.mark.parametrize("given", ["a", "7f3e-11.x:2_b", "x" * 128])
def test_the_clients_own(given: str) -> None:
    assert _answered_id(given) == given


@pytest.mark.parametrize("given", [(), ("",), ("a b",), ("x" * 129,), ("a", "b"), ("a;b",)])
def test_a_new_one(given: tuple[str, ...]) -> None:
    first, second = _answered_id(*given), _answered_id(*given)
    assert first != second
    assert len(first) == len(second) == 32
