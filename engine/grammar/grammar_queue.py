"""Requests whose grammars are compiled before they are added to the engine, beside its loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from nybble.engine.grammar.grammar import Grammar
from nybble.engine.messages import Request

_NUM_THREADS = 2  # a slow grammar leaves a way for others


class GrammarQueue:
    def __init__(self, compile_grammar: Callable[[Grammar], None]) -> None:
        """What goes wrong in `compile_grammar` is found again when the request is added."""
        self._compile = compile_grammar
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "grammar")
        self._pending: dict[str, tuple[Request, Future[None]]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._pending)

    def put(self, request: Request, grammar: Grammar) -> None:
        self._pending[request.request_id] = request, self._future_of(grammar)

    def abort(self, request_id: str) -> None:
        """Forget a request; an unknown id is ignored."""
        found = self._pending.pop(request_id, None)
        if found is not None and all(future is not found[1] for _, future in self._pending.values()):
            found[1].cancel()

    def take_ready(self) -> list[Request]:
        """Those whose grammar is compiled, each once."""
        ready = [request for request, future in self._pending.values() if future.done()]
        for request in ready:
            del self._pending[request.request_id]
        return ready

    def wait(self, seconds: float) -> None:
        """Until a request is ready, but not longer."""
        wait([future for _, future in self._pending.values()], seconds, "FIRST_COMPLETED")

    def _future_of(self, grammar: Grammar) -> Future[None]:
        """Requests of one grammar wait for the same."""
        for request, future in self._pending.values():
            if request.sampling.grammar == grammar:
                return future
        return self._threads.submit(self._compile, grammar)
