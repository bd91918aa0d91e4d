"""The engine in a process of its own: `python -m nybble.engine.engine_process FD`.

FD is its end of the socket pair. It loads what the `Start` message says, then alternates between
reading messages and stepping. With nothing to do it waits in the kernel. It ends when the other end is
closed, so a server that dies takes its engine along.
"""

from __future__ import annotations

import logging
import socket
import sys
import time

from rich.console import Console
from rich.progress import Progress

from nybble.engine.channel import Channel, ChannelClosedError
from nybble.engine.engine import Engine
from nybble.engine.errors import InvalidRequestError, NybbleError
from nybble.engine.loading import Preparation, load_engine, prepare
from nybble.engine.messages import (
    Abort,
    EngineEvent,
    EngineFailed,
    Request,
    RequestRefused,
    Start,
    ToEngine,
)

_STATS_INTERVAL = 1.0  # seconds

logger = logging.getLogger("nybble.engine")


def main() -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    channel: Channel[ToEngine] = Channel(socket.socket(fileno=int(sys.argv[1])), ToEngine)
    try:
        engine = _start(channel)
        if engine is not None:
            serve(engine, channel)
    except ChannelClosedError:
        logger.debug("the server is gone: the engine ends")


def _start(channel: Channel[ToEngine]) -> Engine | None:
    (start,) = channel.receive()
    if not isinstance(start, Start):
        raise TypeError(f"expected Start, received {type(start).__name__}")
    logging.getLogger().setLevel(start.log_level)
    try:
        preparation = prepare(start.config)
        engine = _load(preparation, channel)
    except NybbleError as error:
        channel.send([EngineFailed(message=str(error))])
        return None
    channel.send([preparation.ready_message()])
    return engine


def _load(preparation: Preparation, channel: Channel[ToEngine]) -> Engine:
    logger.info("%s", preparation.config)
    logger.info("%s", preparation.memory)
    num_layers = preparation.model_config.num_hidden_layers
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading weights", total=num_layers)

        def on_layer(layer: int) -> None:
            progress.advance(task)
            channel.poll()  # a server that gave up while we load is noticed here

        return load_engine(preparation, on_layer)


def serve(engine: Engine, channel: Channel[ToEngine]) -> None:
    """Run requests until the channel closes (ChannelClosedError)."""
    last_stats = 0.0
    while True:
        events: list[EngineEvent] = []
        for message in channel.poll() if engine.has_work else _wait(engine, channel):
            events += _handle(message, engine)
        if engine.has_work:
            events += engine.step()
        now = time.monotonic()
        if now - last_stats >= _STATS_INTERVAL:
            channel.send([*events, engine.stats()])
            last_stats = now
        elif events:
            channel.send(events)


def _wait(engine: Engine, channel: Channel[ToEngine]) -> list[ToEngine]:
    engine.check()
    channel.send([engine.stats()])
    return channel.receive()


def _handle(message: ToEngine, engine: Engine) -> list[RequestRefused]:
    match message:
        case Request():
            try:
                engine.add(message)
            except InvalidRequestError as error:
                refusal = RequestRefused(
                    request_id=message.request_id, message=str(error), parameter=error.parameter
                )
                return [refusal]
        case Abort():
            engine.abort(message.request_id)
        case Start():
            raise TypeError("received Start twice")
    return []


if __name__ == "__main__":
    main()
