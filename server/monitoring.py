"""The routes for whoever runs the server: health, readiness, metrics."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nybble.engine.engine_client import ObservedEngine
from nybble.server.errors import UnavailableError
from nybble.server.http_metrics import HTTPMetrics
from nybble.server.metrics import CONTENT_TYPE, Metrics
from nybble.server.readiness import Readiness
from nybble.server.requests.schemas import Status


class Monitoring:
    def __init__(
        self, engine: ObservedEngine, model_name: str, ready_timeout: float, http: HTTPMetrics
    ) -> None:
        self._engine = engine
        self._metrics = Metrics(engine, model_name, http)
        self._readiness = Readiness(engine, ready_timeout)

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
        ]

    async def health(self, request: Request) -> Response:
        if not self._engine.is_alive:
            raise UnavailableError("the engine is not running")
        return _status()

    async def ready(self, request: Request) -> Response:
        await self._readiness.check()
        return _status()

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)


def _status() -> Response:
    return Response(msgspec.json.encode(Status()), media_type="application/json")
