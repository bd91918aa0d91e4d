"""The server's side of the engine: submit a request, read its events, survive the engine's death."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from nybble.engine.answer_queue import AnswerQueues
from nybble.engine.channel import FrameDecoder, encode_frame
from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import EngineDeadError, NybbleError
from nybble.engine.grammar.grammar_checker import GrammarChecker
from nybble.engine.messages import (
    Abort,
    AnswerEvent,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    PromptLogprobs,
    Request,
    RequestAccepted,
    RequestFailed,
    RequestRefused,
    ToEngine,
    TokenEvent,
)
from nybble.engine.ranks.launch import engine_command, engine_environment
from nybble.engine.ranks.launched_rank import is_launched

logger = logging.getLogger("nybble.engine_client")

_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_RESTART_DELAYS = (0.0, 1.0, 5.0, 30.0)  # seconds before each attempt after a death
_STOP_TIMEOUT = 5.0  # seconds from closing the connection to SIGTERM, and from that to SIGKILL


class EngineStartError(NybbleError):
    """The engine could not load."""


class EngineClient(Protocol):
    """What the server needs of an engine. Tests script one."""

    @property
    def is_alive(self) -> bool:
        """Whether a request could be run now."""

    def generate(self, request: Request) -> AsyncGenerator[Sequence[AnswerEvent], None]:
        """Run a request: one event when it is taken, then one a token; each time all that have come.

        Closing the iterator early aborts it.

        Raises:
            InvalidRequestError: the engine refuses it.
            QueueFullError: too many requests wait.
            RequestTimeoutError: its deadline passed.
            RequestFailedError: the engine failed at it, and goes on.
            EngineDeadError: the engine is or goes down.
        """


class ObservedEngine(EngineClient, Protocol):
    """An engine that can be watched."""

    @property
    def stats(self) -> EngineStats | None:
        """Its last word about itself; None before the first."""

    @property
    def last_token_time(self) -> float | None:
        """When its last token came, by `time.monotonic`."""


class SubprocessEngine:
    """An `EngineClient` whose engine is a child process, started again when it dies.

    Where torch's launcher started us, as one rank of several, it is that launcher's part to start the group
    again: `has_ended` is set instead.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._grammars = GrammarChecker(config.checkpoint)
        self._can_restart = not is_launched()
        self.has_ended = asyncio.Event()
        self._answers = AnswerQueues()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._is_alive = False
        self._first_ready: EngineReady | None = None
        self.stats: EngineStats | None = None
        self.last_token_time: float | None = None

    @property
    def is_alive(self) -> bool:
        return self._is_alive

    async def start(self) -> EngineReady:
        """Start the process and wait until it has loaded.

        Raises:
            EngineStartError: it could not; the message says why.
        """
        reader, ready = await self._launch()
        self._first_ready = ready
        self._supervisor = asyncio.create_task(self._supervise(reader))
        return ready

    async def stop(self) -> None:
        """End the process. Open requests get EngineDeadError."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
        self._answers.fail_all()
        await self._end_process()
        await self._grammars.stop()

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[AnswerEvent], None]:
        if not self._is_alive:
            raise EngineDeadError("the engine is not running")
        if request.sampling.grammar is not None:
            await self._grammars.check(request.sampling.grammar)
        queue = self._answers.open(request.request_id)
        try:
            self._send(request)
            while not queue.is_finished:
                yield await queue.take()
        finally:
            self._answers.close(request.request_id)
            if not queue.is_finished:
                self._send(Abort(request_id=request.request_id))

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and self._is_alive:
            self._writer.write(encode_frame([message]))

    async def _launch(self) -> tuple[_Reader, EngineReady]:
        stream, self._writer = await self._run_process()
        reader = _Reader(stream)
        try:
            message = await reader.next()
        except EOFError:
            message = EngineFailed(message="the engine process ended while loading")
        except asyncio.CancelledError:
            await self._end_process()
            raise
        if not isinstance(message, EngineReady):
            await self._end_process()
            reason = message.message if isinstance(message, EngineFailed) else repr(message)
            raise EngineStartError(reason)
        self._is_alive = True
        return reader, message

    async def _run_process(self) -> _Connection:
        """Start the engine and wait until it connects, over a socket where only we may enter."""
        with tempfile.TemporaryDirectory(prefix="nybble-") as directory:
            path = Path(directory) / "engine"
            connected: asyncio.Future[_Connection] = asyncio.get_running_loop().create_future()
            try:
                listener = await asyncio.start_unix_server(
                    lambda *connection: connected.set_result(connection), path, backlog=1
                )
            except OSError as error:
                raise EngineStartError(f"cannot make the socket {path} (see TMPDIR): {error}") from error
            self._process = process = await asyncio.create_subprocess_exec(
                *engine_command(self._config, path, logging.getLogger().level),
                env=engine_environment(self._config),
                start_new_session=True,
            )
            try:
                return await _unless_ended(connected, process)
            except BaseException:
                if process.returncode is None:
                    process.terminate()  # not connected, it cannot be told to end
                raise
            finally:
                listener.close()

    async def _supervise(self, reader: _Reader) -> None:
        """Deliver events; when the engine dies, answer every open request and start it again."""
        while True:
            with suppress(EOFError):
                while True:
                    self._deliver(await reader.next())
            self._is_alive = False
            num_lost = self._answers.fail_all()
            await self._end_process()
            logger.error("the engine died; %d open requests were lost", num_lost)
            if not self._can_restart:
                self.has_ended.set()
                return
            reader = await self._restart()

    async def _restart(self) -> _Reader:
        attempt = 0
        while True:
            await asyncio.sleep(_RESTART_DELAYS[min(attempt, len(_RESTART_DELAYS) - 1)])
            attempt += 1
            try:
                reader, ready = await self._launch()
                await self._check_unchanged(ready)
            except EngineStartError as error:
                logger.error("the engine did not start again (attempt %d): %s", attempt, error)
            else:
                logger.info("the engine is running again")
                return reader

    async def _check_unchanged(self, ready: EngineReady) -> None:
        """The server goes on with the limits and the tokenizer that it read at its start."""
        first = self._first_ready
        if first and _identity(ready) != _identity(first):
            await self._end_process()
            raise EngineStartError("the checkpoint is not the one that was served; start the server anew")

    def _deliver(self, message: FromEngine) -> None:
        match message:
            case TokenEvent():
                self.last_token_time = time.monotonic()
                if not self._answers.put(message):
                    self._send(Abort(request_id=message.request_id))
            case PromptLogprobs() | RequestAccepted() | RequestFailed() | RequestRefused():
                self._answers.put(message)
            case EngineStats():
                self.stats = message
            case EngineFailed():
                logger.error("the engine cannot go on: %s", message.message)

    async def _end_process(self) -> None:
        """Close the connection, which tells the engine to end; if it does not, end it."""
        self._is_alive = False
        if self._writer is not None:
            self._writer.close()
        if self._process is None:
            return
        for end in (self._process.terminate, self._process.kill):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT)
                return
            end()
        await self._process.wait()


class _Reader:
    """Messages one by one from a stream of frames."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._decoder: FrameDecoder[FromEngine] = FrameDecoder(FromEngine)
        self._messages: list[FromEngine] = []

    async def next(self) -> FromEngine:
        """Raises EOFError when the other side is gone."""
        while not self._messages:
            try:
                data = await self._stream.read(1 << 16)
            except OSError as error:
                raise EOFError from error
            if not data:
                raise EOFError
            self._messages = self._decoder.feed(data)[::-1]
        return self._messages.pop()


async def _unless_ended(
    connected: asyncio.Future[_Connection], process: asyncio.subprocess.Process
) -> _Connection:
    """Raises EngineStartError if the process ends before it connects."""
    ended = asyncio.ensure_future(process.wait())
    ended.add_done_callback(lambda _: connected.cancel())
    try:
        await asyncio.wait([connected])
    finally:
        ended.cancel()
    if connected.cancelled():
        raise EngineStartError("the engine process ended while starting")
    return connected.result()


def _identity(ready: EngineReady) -> tuple[int, int, tuple[int, ...]]:
    return ready.vocab_size, ready.max_model_len, ready.eos_token_ids
