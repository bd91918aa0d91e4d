"""An HTTP server on loopback that answers with what a test wrote, byte for byte."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = json.dumps({"data": [{"id": "tiny"}]}).encode()


def response(body: bytes, status: int = 200, *headers: str) -> bytes:
    """A response that ends with its connection."""
    lines = (f"HTTP/1.1 {status} Whatever", "Connection: close", *headers)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def events(*chunks: object, done: bool = True) -> bytes:
    """Server-sent events of `chunks`."""
    data = [json.dumps(chunk).encode() for chunk in chunks] + [b"[DONE]"] * done
    return b"".join(b"data: " + line + b"\n\n" for line in data)


def text_chunks(*pieces: str, usage: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """Chunks as a server streams them: role, pieces, finish reason, usage."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces), {}]
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    return [*chunks, {"choices": [], "usage": usage}] if usage else chunks


class CannedServer:
    """`answers` go out one by one, one to each POST; GET answers `models`. `requests` holds what came."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.models = response(MODELS)
        self.answers: list[bytes] = []
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []


@contextmanager
def canned_server() -> Iterator[CannedServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            canned.paths.append(self.path)
            self.wfile.write(canned.models)

        def do_POST(self) -> None:
            canned.paths.append(self.path)
            canned.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.wfile.write(canned.answers.pop(0))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        canned = CannedServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield canned
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def refusing_url() -> Iterator[str]:
    """The address of a port that is taken, but where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
