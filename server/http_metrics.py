"""What HTTP requests there were, by route, for `/metrics`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_OTHER = "other"  # a method or path of the client's own is no label: there would be any number
_LABELS = ("route", "method")


@dataclass
class _Counts:
    """Of one route and method."""

    by_status: Counter[int] = field(default_factory=Counter)
    in_flight: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0


class HTTPMetrics(Collector):
    """Told of every request by `CountRequests`."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], _Counts] = {}

    def of(self, route: str, method: str) -> _Counts:
        return self._counts.setdefault((route, method), _Counts())

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "nybble:http_requests", "Answers begun, by status.", labels=(*_LABELS, "status")
        )
        in_flight = GaugeMetricFamily(
            "nybble:http_requests_in_flight", "Requests that are open.", labels=_LABELS
        )
        received = CounterMetricFamily("nybble:http_received_bytes", "Of bodies of requests.", labels=_LABELS)
        sent = CounterMetricFamily("nybble:http_sent_bytes", "Of bodies of answers.", labels=_LABELS)
        for labels, counts in sorted(self._counts.items()):
            for status, number in sorted(counts.by_status.items()):
                requests.add_metric((*labels, str(status)), number)
            in_flight.add_metric(labels, counts.in_flight)
            received.add_metric(labels, counts.bytes_received)
            sent.add_metric(labels, counts.bytes_sent)
        return iter((requests, in_flight, received, sent))


class CountRequests:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: HTTPMetrics, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = [route for route in routes if isinstance(route, Route)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counts = self._metrics.of(self._route(scope), _method(scope))

        async def count_received() -> Message:
            message = await receive()
            counts.bytes_received += len(message.get("body", b""))
            return message

        async def count_sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                counts.by_status[message["status"]] += 1
            else:
                counts.bytes_sent += len(message.get("body", b""))
            await send(message)

        counts.in_flight += 1
        try:
            await self._app(scope, count_received, count_sent)
        finally:
            counts.in_flight -= 1

    def _route(self, scope: Scope) -> str:
        found = (route.path for route in self._routes if route.matches(scope)[0] is not Match.NONE)
        return next(found, _OTHER)


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in _METHODS else _OTHER
