"""Puts the engine process and the HTTP server together."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from starlette.applications import Starlette

from nybble.engine.engine_client import SubprocessEngine
from nybble.engine.errors import EngineDeadError
from nybble.engine.garbage import settle
from nybble.engine.messages import EngineReady
from nybble.engine.tokenizer import Tokenizer
from nybble.server.access.opened_access import opened_access
from nybble.server.app import create_app
from nybble.server.http_protocol import http_protocol
from nybble.server.listening import bind, listen, tls_context, url_of
from nybble.server.served_model import describe_model
from nybble.server.server_config import ServeConfig, ServerConfig

logger = logging.getLogger("nybble.server")

_SWITCH_INTERVAL = 0.0005  # seconds; Python's default is ten times that
_IDLE_SECONDS = 75  # of a connection between requests: longer than clients and proxies keep theirs


def _log_address(url: str) -> None:
    logger.info("listening on %s", url)


def run_on_uvloop(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, on the faster loop; uvicorn only chooses it where it starts the loop itself.

    While the loop is busy, a thread that reads a request waits for the interpreter for a switch interval, and
    that at least twice.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


async def serve(config: ServeConfig, announce: Callable[[str], None] = _log_address) -> None:
    """Serve until SIGINT or SIGTERM; `announce` is told the address once it answers.

    Raises:
        NybbleError: it cannot start.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel if task else loop.stop)
    with suppress(asyncio.CancelledError):
        async with prepared_server(config) as (server, sock):
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, server.stop)
            announce(url_of(sock, config.server.ssl_certfile is not None))
            await server.serve(sockets=[sock])
            logger.info("stopped")
            if server.has_lost_engine:
                raise EngineDeadError("a rank ended and with it the engine; start all ranks again")


class HTTPServer(uvicorn.Server):
    """uvicorn with our own end.

    Its signal handling raises a signal again after a graceful end, which would skip ending the engine and
    turn exit code 0 into a death by signal. Its time limit cuts connections; ours stops the engine, so
    that what is still open is answered with an error.
    """

    def __init__(self, settings: uvicorn.Config, engine: SubprocessEngine, shutdown_timeout: float) -> None:
        super().__init__(settings)
        self._engine = engine
        self._shutdown_timeout = shutdown_timeout

    def stop(self) -> None:
        """Finish open requests within the timeout; called again, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.create_task(self._stop_engine_later())
        await super().shutdown(sockets)
        timer.cancel()

    @property
    def has_lost_engine(self) -> bool:
        """Whether the engine ended for good, and the server with it."""
        return self._engine.has_ended.is_set()

    async def stop_with_engine(self) -> None:
        """Stop when the engine ends for good."""
        await self._engine.has_ended.wait()
        self.stop()

    async def _stop_engine_later(self) -> None:
        await asyncio.sleep(self._shutdown_timeout)
        logger.warning("open requests did not end within %g s", self._shutdown_timeout)
        await self._engine.stop()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@asynccontextmanager
async def prepared_server(
    config: ServeConfig,
) -> AsyncGenerator[tuple[HTTPServer, socket.socket], None]:
    """A server ready to serve on a bound socket, with its engine loaded; the engine ends with it.

    Raises:
        BindError: the port is in use or the address is not ours.
        NybbleError: the checkpoint or an option is bad.
    """
    context = tls_context(config.server)
    async with opened_access(config.server) as access:
        sock = bind(config.server)
        engine = SubprocessEngine(config.engine)
        try:
            ready, tokenizer = await _load(engine, Path(config.engine.checkpoint))
            model = describe_model(config.server.served_model_name, tokenizer, ready)
            app = create_app(engine, model, config.server, access)
            logger.info("serving %r, up to %d tokens", model.name, model.max_model_len)
            settings = _settings(app, config.server, context)
            server = HTTPServer(settings, engine, config.server.shutdown_timeout)
            settle()
            listen(sock)
            watch = asyncio.create_task(server.stop_with_engine())
            try:
                yield server, sock
            finally:
                watch.cancel()
        finally:
            sock.close()
            await engine.stop()


def _settings(app: Starlette, config: ServerConfig, context: ssl.SSLContext | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=http_protocol(config.client_timeout),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nothing asks who is behind a proxy
        timeout_keep_alive=_IDLE_SECONDS,
        # Beyond our own limit, for connections that never became a request.
        timeout_graceful_shutdown=config.shutdown_timeout + 2,
        ssl_certfile=config.ssl_certfile,
        ssl_context_factory=(lambda *_: context) if context else None,
    )


async def _load(engine: SubprocessEngine, checkpoint: Path) -> tuple[EngineReady, Tokenizer]:
    """Load engine and tokenizer side by side; the first to fail ends the other."""
    try:
        async with asyncio.TaskGroup() as group:
            ready = group.create_task(engine.start())
            tokenizer = group.create_task(asyncio.to_thread(Tokenizer, checkpoint))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return ready.result(), tokenizer.result()
