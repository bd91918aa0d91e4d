"""A small client of the chat API: `nybble chat`, and the demo's question."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nybble.engine.errors import NybbleError

Messages = list[dict[str, str]]


class ChatClientError(NybbleError):
    """The server cannot be reached or refuses the request."""


@dataclass(frozen=True)
class Speed:
    """seconds_to_first: from sending the request to the first piece of text."""

    num_prompt_tokens: int
    num_tokens: int
    seconds_to_first: float
    seconds_after_first: float

    def __str__(self) -> str:
        is_timed = self.num_tokens > 1 and self.seconds_after_first > 0
        rate = (self.num_tokens - 1) / self.seconds_after_first if is_timed else 0.0
        return (
            f"{self.num_prompt_tokens} prompt tokens, {self.num_tokens} tokens of answer, "
            f"first after {self.seconds_to_first:.2f} s, then {rate:.1f} tokens/s"
        )


@dataclass(frozen=True)
class Thought:
    """A piece of what the model thinks before its answer."""

    text: str


@dataclass(frozen=True)
class Answer:
    """A piece of what it says."""

    text: str


class ChatClient:
    """Talks to one server. `url` is its root, such as http://127.0.0.1:8000."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise ChatClientError(f"{url!r} is not an http or https address")
        self._url = url
        self._key_header = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._parts = parts
        self.speed: Speed | None = None  # of the last answer

    def model_name(self) -> str:
        """Name of the model that is served. Raises ChatClientError."""
        with self._understood(), self._request("GET", "/v1/models") as response:
            return str(json.load(response)["data"][0]["id"])

    def stream(self, model: str, messages: Messages, temperature: float | None) -> Iterator[Thought | Answer]:
        """Thought and answer piece by piece; `speed` is set at the end. Raises ChatClientError."""
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if temperature is not None:
            body["temperature"] = temperature
        start, first, usage = time.perf_counter(), None, dict[str, int]()
        with self._understood(), self._request("POST", "/v1/chat/completions", body) as response:
            for chunk in _events(response):
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    for piece in _pieces(choice["delta"]):
                        first = first or time.perf_counter()
                        yield piece
        end = time.perf_counter()
        self.speed = Speed(
            num_prompt_tokens=usage.get("prompt_tokens", 0),
            num_tokens=usage.get("completion_tokens", 0),
            seconds_to_first=(first or end) - start,
            seconds_after_first=end - (first or end),
        )

    def _request(self, method: str, path: str, body: object = None) -> http.client.HTTPResponse:
        is_secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port)
        headers = {"Content-Type": "application/json", "Connection": "close"} | self._key_header
        data = None if body is None else json.dumps(body).encode()
        root = urllib.parse.quote(self._parts.path.rstrip("/"))
        try:
            connection.request(method, root + path, data, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            connection.close()
            raise ChatClientError(f"{self._url}: cannot be reached: {error}") from error
        if response.status != 200:
            with response:
                raise ChatClientError(_error_message(response.status, response.read()))
        return response

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """An answer that breaks off, or is not one of the API's, is a ChatClientError too."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            raise ChatClientError(f"{self._url}: the answer broke off: {error!r}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ChatClientError(f"{self._url}: the answer is not the chat API's: {error!r}") from error


def _pieces(delta: dict[str, Any]) -> Iterator[Thought | Answer]:
    """By either name of a thought: servers use one or both."""
    if thought := delta.get("reasoning_content") or delta.get("reasoning"):
        yield Thought(thought)
    if text := delta.get("content"):
        yield Answer(text)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event up to [DONE]."""
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if not line.startswith(b"data: "):
            continue
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ChatClientError(event["error"]["message"])
        yield event
    raise ChatClientError("the answer broke off")


def _error_message(status: int, body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: {body[:200].decode('utf-8', 'replace')}"
