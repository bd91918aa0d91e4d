"""Puts the engine process and the HTTP server together."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from nybble.engine.engine_client import SubprocessEngine
from nybble.engine.errors import EngineDeadError, NybbleError
from nybble.engine.messages import EngineReady
from nybble.engine.tokenizer import Tokenizer
from nybble.server.app import create_app
from nybble.server.served_model import describe_model
from nybble.server.server_config import ServeConfig, ServerConfig

logger = logging.getLogger("nybble.server")


class BindError(NybbleError):
    """The address cannot be listened on."""


def _log_address(url: str) -> None:
    logger.info("listening on %s", url)


def run_on_uvloop(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, on the faster loop; uvicorn only chooses it where it starts the loop itself."""
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
            announce(url_of(sock))
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
    sock = _bind(config.server)
    engine = SubprocessEngine(config.engine)
    try:
        ready, tokenizer = await _load(engine, Path(config.engine.checkpoint))
        model = describe_model(config.server.served_model_name, tokenizer, ready)
        app = create_app(engine, model, config.server)
        logger.info("serving %r, up to %d tokens", model.name, model.max_model_len)
        settings = uvicorn.Config(
            app,
            # httptools takes a POST with `Upgrade: h2c`, as Java's client sends, for one without a body, and
            # headers of any size.
            http="h11",
            lifespan="off",
            log_config=None,
            access_log=False,
            # Beyond our own limit, for connections that never became a request.
            timeout_graceful_shutdown=config.server.shutdown_timeout + 2,
        )
        server = HTTPServer(settings, engine, config.server.shutdown_timeout)
        _listen(sock)
        watch = asyncio.create_task(server.stop_with_engine())
        try:
            yield server, sock
        finally:
            watch.cancel()
    finally:
        sock.close()
        await engine.stop()


def url_of(sock: socket.socket) -> str:
    """The address of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _load(engine: SubprocessEngine, checkpoint: Path) -> tuple[EngineReady, Tokenizer]:
    """Load engine and tokenizer side by side; the first to fail ends the other."""
    try:
        async with asyncio.TaskGroup() as group:
            ready = group.create_task(engine.start())
            tokenizer = group.create_task(asyncio.to_thread(Tokenizer, checkpoint))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return ready.result(), tokenizer.result()


def _listen(sock: socket.socket) -> None:
    """Raises BindError: another server began to listen on the port while we loaded."""
    try:
        sock.listen()
    except OSError as error:
        raise BindError(f"cannot listen on {sock.getsockname()}: {error}") from error


def _bind(config: ServerConfig) -> socket.socket:
    """Take the port at once, so that one on which a server listens is known before the weights are loaded.

    It does not listen yet: until the engine is ready, a client is refused, not left waiting.
    """
    if not 0 <= config.port <= 65535:
        raise BindError(f"port is {config.port}, expected 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        raise BindError(f"cannot listen on {config.host}:{config.port}: {error}") from error
    return sock
