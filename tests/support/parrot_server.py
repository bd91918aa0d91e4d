"""Serves the API over the parrot engine, on a free port of loopback. Logs to standard error."""

from __future__ import annotations

import logging
import socket
import tempfile
from pathlib import Path

import uvicorn
from glm_model import glm_model
from parrot_engine import ParrotEngine

from nybble.server.app import create_app
from nybble.server.listening import url_of
from nybble.server.server_config import ServerConfig


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    with tempfile.TemporaryDirectory() as directory, socket.socket() as sock:
        model = glm_model(Path(directory))
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        logging.info("listening on %s", url_of(sock))
        app = create_app(ParrotEngine(model.tokenizer), model, ServerConfig())
        settings = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False
        )
        uvicorn.Server(settings).run([sock])


if __name__ == "__main__":
    main()
