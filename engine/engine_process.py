"""A rank in a process of its own: `python -m nybble.engine.engine_process SOCKET LOG_LEVEL CONFIG`.

Rank 0 connects to the server's Unix socket SOCKET, loads what the JSON `EngineConfig` CONFIG says, then
alternates between reading messages and stepping. With nothing to do it waits in the kernel. It ends when
the server closes the connection, so a server that dies takes its engine along. The other ranks follow rank
0 and end with it.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from nybble.engine.channel import Channel, ChannelClosedError
from nybble.engine.engine import Engine
from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import EngineBrokenError, InvalidRequestError, NybbleError, QueueFullError
from nybble.engine.garbage import settle
from nybble.engine.grammar.grammar_queue import GrammarQueue
from nybble.engine.loading import Preparation, build_engine
from nybble.engine.log_format import configure_logging
from nybble.engine.messages import (
    Abort,
    EngineEvent,
    EngineFailed,
    EngineReady,
    Request,
    RequestAccepted,
    RequestFailed,
    RequestRefused,
    ToEngine,
)
from nybble.engine.model.worker import Worker
from nybble.engine.null_serving import start_null_engine
from nybble.engine.planning.placement import Placement
from nybble.engine.ranks.launch import REFUSED, end_with_parent
from nybble.engine.ranks.launched_rank import LaunchedRank
from nybble.engine.ranks.lifeline import end_process
from nybble.engine.ranks.rank_group import RankGroup
from nybble.engine.ranks.start import StartedRank, start_rank

_STATS_INTERVAL = 1.0  # seconds
_QUIET_TIME = 0.5  # seconds without a request, after which one is not expected at once
_LIFELINE_TIME = 0.5  # seconds
_GRAMMAR_WAIT = 0.01  # seconds, between looks for messages while a grammar is compiled and nothing else done

logger = logging.getLogger("nybble.engine")


def main() -> None:
    socket_path, log_level, encoded = sys.argv[1:]
    end_with_parent(signal.SIGKILL)
    config = msgspec.json.decode(encoded, type=EngineConfig)
    configure_logging(int(log_level), config.log_format)
    is_first = LaunchedRank.from_environment().rank == 0
    end_process(run_rank(lambda: lead(config, socket_path) if is_first else follow(config)))


def run_rank(role: Callable[[], None]) -> int:
    """`lead` or `follow` to its end; returns the exit code."""
    try:
        role()
    except ChannelClosedError:
        logger.debug("the server is gone: the engine ends")
    except NybbleError as error:
        logger.debug("%s", error)  # rank 0 has told the server
        return REFUSED
    except Exception:
        # Where another rank's end is the cause, the lifeline says so and ends this one meanwhile.
        time.sleep(_LIFELINE_TIME)
        logger.exception("this rank fails")
        return 1
    return 0


def lead(config: EngineConfig, socket_path: str) -> None:
    """Be rank 0 until the server closes the connection.

    Raises:
        NybbleError: a rank could not start; the server has been told.
        ChannelClosedError: the server is gone before the engine was ready.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(socket_path)
    channel: Channel[ToEngine] = Channel(connection, ToEngine)
    try:
        engine, ready, group = _start_engine(config, channel)
    except NybbleError as error:
        channel.send([EngineFailed(message=str(error))])
        raise
    settle()
    try:
        channel.send([ready])
        serve(engine, channel)
    except ChannelClosedError:
        group.announce_end()
        group.close()


def follow(config: EngineConfig) -> None:
    """Be one of the other ranks until rank 0 ends.

    Raises:
        NybbleError: a rank could not start.
    """
    worker, group = _start_follower(config)
    settle()
    # Who stops the server stops the launcher too, which signals every rank. Rank 0 finishes its requests
    # first, and needs the others for that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    worker.follow()
    group.close()


def _start_engine(config: EngineConfig, channel: Channel[ToEngine]) -> tuple[Engine, EngineReady, RankGroup]:
    if config.null_step_ms is not None:
        return *start_null_engine(config), RankGroup(Placement())
    rank = _start(config, channel)
    engine = build_engine(rank.preparation, rank.worker, rank.group)
    return engine, rank.preparation.ready_message(), rank.group


def _start_follower(config: EngineConfig) -> tuple[Worker[Tensor], RankGroup]:
    rank = start_rank(config)
    return rank.worker, rank.group


def _start(config: EngineConfig, channel: Channel[ToEngine]) -> StartedRank:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading weights", total=None)

        def on_prepared(preparation: Preparation) -> None:
            logger.info("%s", preparation.config)
            logger.info("%s", preparation.memory)
            num_layers = preparation.memory.cache_geometry.num_layers
            progress.update(task, total=num_layers)

        def on_layer(layer: int) -> None:
            progress.advance(task)
            channel.poll()  # a server that gave up while we load is noticed here

        return start_rank(config, on_prepared, on_layer)


def serve(engine: Engine, channel: Channel[ToEngine]) -> None:
    """Run requests until the channel closes (ChannelClosedError).

    Raises:
        EngineBrokenError: a step failed and no other can be run; the server has been told.
    """
    outbox = _Outbox(engine, channel)
    grammars = GrammarQueue(engine.compile_grammar)
    while True:
        for message in _messages(engine, channel, grammars):
            outbox.events += _handle(message, engine, grammars)
        for request in grammars.take_ready():
            outbox.events += _add(request, engine)
        if engine.has_work:
            # A step's events go out while the next one is computed.
            step_events = engine.step(meanwhile=outbox.send)
            outbox.events += step_events
        if engine.failure is not None:
            channel.send([*outbox.events, EngineFailed(message=engine.failure)])
            raise EngineBrokenError(engine.failure)
        if not engine.has_work:
            outbox.send()


class _Outbox:
    """Events on their way to the server, and now and then the engine's statistics."""

    def __init__(self, engine: Engine, channel: Channel[ToEngine]) -> None:
        self.events: list[EngineEvent] = []
        self._engine = engine
        self._channel = channel
        self._last_stats = 0.0

    def send(self) -> None:
        now = time.monotonic()
        if now - self._last_stats >= _STATS_INTERVAL:
            self._channel.send([*self.events, self._engine.stats()])
            self._last_stats = now
        elif self.events:
            self._channel.send(self.events)
        self.events = []


def _messages(engine: Engine, channel: Channel[ToEngine], grammars: GrammarQueue) -> list[ToEngine]:
    """Those that have come; with nothing to do, waits for some."""
    if not engine.has_work:
        if not grammars.has_work:
            return _wait(engine, channel)
        grammars.wait(_GRAMMAR_WAIT)
    return channel.poll()


def _wait(engine: Engine, channel: Channel[ToEngine]) -> list[ToEngine]:
    channel.send([engine.stats()])
    if not channel.wait(_QUIET_TIME):
        engine.check()  # takes milliseconds where there are many blocks, for which no request should wait
    return channel.receive()


def _handle(message: ToEngine, engine: Engine, grammars: GrammarQueue) -> list[EngineEvent]:
    match message:
        case Request() if message.sampling.grammar is not None:
            grammars.put(message, message.sampling.grammar)
        case Request():
            return _add(message, engine)
        case Abort():
            grammars.abort(message.request_id)
            engine.abort(message.request_id)
    return []


def _add(request: Request, engine: Engine) -> list[EngineEvent]:
    """Whatever is wrong with a request is answered to it alone."""
    name = request.request_id
    try:
        engine.add(request)
    except InvalidRequestError as error:
        return [RequestRefused(request_id=name, message=str(error), parameter=error.parameter)]
    except QueueFullError as error:
        return [RequestRefused(request_id=name, message=str(error), retry_after=error.retry_after)]
    except Exception as error:
        logger.exception("a request could not be added")
        message = f"the engine failed at this request: {type(error).__name__}"
        return [RequestFailed(request_id=name, message=message, kind="internal")]
    return [RequestAccepted(request_id=name)]


if __name__ == "__main__":
    main()
