"""One streamed chat completion, timed as its bytes arrive: what a load generator sends.

It is a protocol of asyncio's own, with no streams, tasks or queues between the socket and the clock.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from nybble.engine.errors import OptionError
from nybble.server.bench.response_reader import BadResponseError, EventReader, ResponseReader

_MAX_ERROR_BYTES = 1 << 16


@dataclass(frozen=True)
class Target:
    """A server. root: path of the API, such as "/v1"; key: to be sent, or None."""

    host: str
    port: int
    root: str
    is_secure: bool
    key: str | None = field(repr=False)

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Target:
        """Of a base URL, with or without the /v1 at its end. Raises OptionError."""
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise OptionError(f"url: {url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"url: {url!r} is not an http or https address")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise OptionError("the API key has characters that no header can hold")
        is_secure = parts.scheme == "https"
        root = urllib.parse.quote(parts.path.rstrip("/"), safe="/%") or "/v1"
        return cls(parts.hostname, port or (443 if is_secure else 80), root, is_secure, key)

    def url(self, path: str) -> str:
        return f"{'https' if self.is_secure else 'http'}://{self._address}{self.root}{path}"

    def authorization(self) -> dict[str, str]:
        """The header that shows the key, if there is one."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    @property
    def _address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def request(self, body: bytes) -> bytes:
        """The bytes of a request for a chat completion."""
        lines = [
            f"POST {self.root}/chat/completions HTTP/1.1",
            f"Host: {self._address}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            "Connection: close",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in self.authorization().items()),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Timing:
    """What became of one request. Times are seconds of `time.monotonic`.

    scheduled: when it should have been sent; sent: when it was, its connection being open by then.
    first_byte: of the response; output_times: of each chunk that carried output, in order; end: of its last
    byte. Numbers of tokens are the server's (`usage`); where its streams have none, an answer that ends for
    its length has num_asked_tokens. error: why this is not a finished answer.
    """

    scheduled: float
    sent: float = 0.0
    first_byte: float | None = None
    output_times: list[float] = field(default_factory=list)
    end: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None
    num_asked_tokens: int = 0


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _PromptTokensDetails(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptTokensDetails | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_chunks = msgspec.json.Decoder(_Chunk)


async def send_timed(target: Target, body: bytes, timing: Timing) -> None:
    """Send `body` now, over a connection of its own, and read to the end. Cancelling it hangs up.

    Whatever goes wrong is the timing's `error`.
    """
    exchange, transport = _Exchange(timing), None
    timing.error = "not finished when the time was up"
    try:
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: exchange, target.host, target.port, ssl=_tls() if target.is_secure else None
        )
        timing.sent = time.monotonic()
        transport.write(target.request(body))
        await exchange.done
    except OSError as error:
        timing.error = f"cannot connect: {error}"
    finally:
        timing.end = timing.end or time.monotonic()
        if transport is not None:
            transport.abort()


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Exchange(asyncio.Protocol):
    """`done` when the response has come to its end, good or bad."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._response = ResponseReader()
        self._events = EventReader()
        self._has_usage = False
        self._is_done = False  # the stream has said so
        self._error: str | None = None  # that the stream told
        self._error_body = b""

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self.timing.first_byte is None:
            self.timing.first_byte = now
        try:
            self._take(self._response.feed(data), now)
        except (BadResponseError, msgspec.DecodeError, msgspec.ValidationError) as error:
            self._end(f"not a stream of chat completions: {error}")
            return
        if self._response.is_complete:
            self._end(self._fault())

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            self._response.finish()
        except BadResponseError as error:
            self._end(str(exc or error))
        else:
            self._end(self._fault())

    def _take(self, body: bytes, now: float) -> None:
        if self._response.status != 200:
            self._error_body = (self._error_body + body)[:_MAX_ERROR_BYTES]
            return
        for data in self._events.feed(body):
            if data == b"[DONE]":
                self._is_done = True
                continue
            chunk = _chunks.decode(data)
            if any(_has_output(choice.delta) for choice in chunk.choices):
                self.timing.output_times.append(now)
            if not self._has_usage and any(choice.finish_reason == "length" for choice in chunk.choices):
                self.timing.num_output_tokens = self.timing.num_asked_tokens
            if chunk.usage is not None:
                self._count(chunk.usage)
            if chunk.error is not None:
                self._error = f"in the stream: {_message({'error': chunk.error})}"

    def _count(self, usage: _Usage) -> None:
        self._has_usage = True
        self.timing.num_prompt_tokens = usage.prompt_tokens
        self.timing.num_output_tokens = usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            self.timing.num_cached_tokens = usage.prompt_tokens_details.cached_tokens or 0

    def _fault(self) -> str | None:
        """What is wrong with a response that has come to its end."""
        if self._response.status != 200:
            return f"HTTP {self._response.status}: {described(self._error_body)}"
        if self._error is not None:
            return self._error
        if not self._is_done:
            return "the stream ended without [DONE]"
        if not self._has_usage and not self.timing.num_output_tokens:
            return "no usage in the stream of an answer that ended early: its tokens cannot be counted"
        return None if self.timing.output_times else "the answer is empty"

    def _end(self, error: str | None) -> None:
        if not self.done.done():
            self.timing.error = error
            self.timing.end = time.monotonic()
            self.done.set_result(None)


def _has_output(delta: _Delta) -> bool:
    return bool(
        delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls or delta.refusal
    )


def described(body: bytes) -> str:
    """What an answer that is an error says, shortened."""
    try:
        return _message(msgspec.json.decode(body))
    except msgspec.DecodeError:
        return body[:200].decode("utf-8", "replace")


def _message(body: Any) -> str:
    """Of an error in OpenAI's shape, or whatever else there is."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:200]
