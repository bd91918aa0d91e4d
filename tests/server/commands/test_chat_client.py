from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from canned_server import CannedServer, canned_server, events, refusing_url, response, text_chunks
from scripted_engine import ScriptedEngine

from nybble.engine.errors import EngineDeadError
from nybble.server.app import create_app
from nybble.server.commands.chat_client import Answer, ChatClient, ChatClientError, Speed, Thought
from nybble.server.served_model import ServedModel
from nybble.server.server_config import ServerConfig

QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server() -> Iterator[CannedServer]:
    with canned_server() as server:
        yield server


def _stream(server: CannedServer, *answers: bytes) -> list[Thought | Answer]:
    server.answers += answers
    return list(ChatClient(server.url).stream("tiny", QUESTION, None))


def test_the_pieces_of_an_answer(server: CannedServer) -> None:
    pieces = _stream(server, response(events(*text_chunks("a", "é\n", "b"))))
    assert pieces == [Answer("a"), Answer("é\n"), Answer("b")]


def test_thoughts_by_either_name_or_both() -> None:
    with canned_server() as server:
        deltas = [{"reasoning_content": "a", "reasoning": "a"}, {"reasoning": "b"}, {"content": "c"}]
        chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        pieces = _stream(server, response(events(*chunks)))
    assert pieces == [Thought("a"), Thought("b"), Answer("c")]


def test_the_model_name(server: CannedServer) -> None:
    assert ChatClient(server.url).model_name() == "tiny"


@pytest.mark.parametrize("root", ["", "/", "/proxied", "/proxied/"])
def test_paths_are_below_the_url(server: CannedServer, root: str) -> None:
    server.answers = [response(events())]
    client = ChatClient(server.url + root)
    client.model_name()
    list(client.stream("tiny", QUESTION, None))
    prefix = root.rstrip("/")
    assert server.paths == [f"{prefix}/v1/models", f"{prefix}/v1/chat/completions"]


@pytest.mark.parametrize("temperature", [None, 0.0, 1.5])
def test_what_is_asked(server: CannedServer, temperature: float | None) -> None:
    server.answers = [response(events())]
    list(ChatClient(server.url).stream("tiny", QUESTION, temperature))
    given = {} if temperature is None else {"temperature": temperature}
    assert server.requests == [
        {
            "model": "tiny",
            "messages": QUESTION,
            "stream": True,
            "stream_options": {"include_usage": True},
            **given,
        }
    ]


def test_speed(server: CannedServer) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    server.answers = [response(events(*text_chunks("a", "b", usage=usage)))]
    client = ChatClient(server.url)
    assert client.speed is None
    list(client.stream("tiny", QUESTION, None))
    assert client.speed is not None
    assert (client.speed.num_prompt_tokens, client.speed.num_tokens) == (7, 3)
    assert client.speed.seconds_to_first > 0
    assert client.speed.seconds_after_first > 0


def test_speed_of_an_empty_answer(server: CannedServer) -> None:
    server.answers = [response(events(*text_chunks()))]
    client = ChatClient(server.url)
    list(client.stream("tiny", QUESTION, None))
    assert client.speed is not None
    assert client.speed.num_tokens == 0
    assert client.speed.seconds_after_first == 0
    assert "0 tokens of answer" in str(client.speed)


@pytest.mark.parametrize(
    ("num_tokens", "seconds", "rate"), [(0, 0.0, "0.0"), (1, 0.0, "0.0"), (11, 2.0, "5.0"), (2, 0.5, "2.0")]
)
def test_the_rate_is_of_the_tokens_after_the_first(num_tokens: int, seconds: float, rate: str) -> None:
    speed = Speed(
        num_prompt_tokens=7, num_tokens=num_tokens, seconds_to_first=0.25, seconds_after_first=seconds
    )
    assert str(speed) == (
        f"7 prompt tokens, {num_tokens} tokens of answer, first after 0.25 s, then {rate} tokens/s"
    )


@pytest.mark.parametrize("noise", [b": a comment\n\n", b"\n\n\n", b"event: x\nid: 7\n", b"\r\n"])
def test_lines_that_are_not_data_are_skipped(server: CannedServer, noise: bytes) -> None:
    body = events(*text_chunks("a"), done=False) + noise + events(*text_chunks("b"))
    assert _stream(server, response(body)) == [Answer("a"), Answer("b")]


def test_what_follows_done_is_not_read(server: CannedServer) -> None:
    body = events(*text_chunks("a")) + b"data: nonsense\n\n"
    assert _stream(server, response(body)) == [Answer("a")]


@pytest.mark.parametrize("chunks", [[], text_chunks("a", "b")])
@pytest.mark.parametrize("headers", [(), ("Content-Length: 9999",)])
def test_a_stream_that_breaks_off(
    server: CannedServer, chunks: list[object], headers: tuple[str, ...]
) -> None:
    body = events(*chunks, done=False)
    with pytest.raises(ChatClientError, match="broke off"):
        _stream(server, response(body, 200, *headers))


def test_pieces_before_the_break_are_given(server: CannedServer) -> None:
    server.answers = [response(events(*text_chunks("a"), done=False))]
    pieces = ChatClient(server.url).stream("tiny", QUESTION, None)
    assert next(pieces) == Answer("a")
    with pytest.raises(ChatClientError, match="broke off"):
        list(pieces)


def test_an_error_event(server: CannedServer) -> None:
    error = {"error": {"message": "the engine stopped"}}
    with pytest.raises(ChatClientError, match=r"^the engine stopped$"):
        _stream(server, response(events(*text_chunks("a"), error)))


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_an_error_status_tells_the_servers_message(server: CannedServer, status: int) -> None:
    body = json.dumps({"error": {"message": "temperature: too hot"}}).encode()
    with pytest.raises(ChatClientError, match=r"^temperature: too hot$"):
        _stream(server, response(body, status))


@pytest.mark.parametrize("body", [b"<h1>Bad Gateway</h1>", b"", b"[]", b'{"error": "no"}', b"\xff", b"{}"])
def test_an_error_of_another_shape_is_shown(server: CannedServer, body: bytes) -> None:
    server.models = response(body, 502)
    with pytest.raises(ChatClientError) as caught:
        ChatClient(server.url).model_name()
    assert str(caught.value) == f"HTTP 502: {body.decode('utf-8', 'replace')}"


def test_a_long_error_page_is_cut(server: CannedServer) -> None:
    server.models = response(b"x" * 10_000, 502)
    with pytest.raises(ChatClientError) as caught:
        ChatClient(server.url).model_name()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("answer", [b""])
def test_something_that_does_not_speak_http(server: CannedServer, answer: bytes) -> None:
    server.models = answer
    with pytest.raises(ChatClientError, match="cannot be reached"):
        ChatClient(server.url).model_name()


def test_nobody_listens() -> None:
    with refusing_url() as url, pytest.raises(ChatClientError, match=f"^{url}: cannot be reached: "):
        ChatClient(url).model_name()


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "localhost", "ftp://x", "http://", "file:///etc/hosts"]
)
def test_not_an_address(url: str) -> None:
    with pytest.raises(ChatClientError, match="is not an http or https address"):
        ChatClient(url)


# --- against the server itself


@contextmanager
def _serving(engine: ScriptedEngine, model: ServedModel) -> Iterator[str]:
    config = uvicorn.Config(create_app(engine, model, ServerConfig()), port=0, log_config=None, ws="none")
    sock = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
    sock.listen()  # before the server does: connections wait until it takes them
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def test_the_server_answers_it(model: ServedModel, end_id: int) -> None:
    with _serving(ScriptedEngine([*"hé".encode(), end_id]), model) as url:
        client = ChatClient(url)
        assert client.model_name() == "tiny"
        pieces = client.stream("tiny", QUESTION, 0.0)
        assert "".join(piece.text for piece in pieces) == "hé"
        assert client.speed is not None
        assert (client.speed.num_prompt_tokens, client.speed.num_tokens) == (4, 4)


def test_the_server_refuses_it(model: ServedModel) -> None:
    with (
        _serving(ScriptedEngine([65]), model) as url,
        pytest.raises(ChatClientError, match="temperature: "),
    ):
        list(ChatClient(url).stream("tiny", QUESTION, 3.0))


def test_the_servers_engine_dies(model: ServedModel) -> None:
    pieces: list[Thought | Answer] = []
    with (
        _serving(ScriptedEngine([65, EngineDeadError("the engine stopped")]), model) as url,
        pytest.raises(ChatClientError, match=r"^the engine stopped$"),
    ):
        for piece in ChatClient(url).stream("tiny", QUESTION, None):
            pieces.append(piece)
    assert pieces == [Answer("A")]


_CHUNKED = "Transfer-Encoding: chunked"
_PART = events(*text_chunks("a"), done=False)
_CHUNK = b"%x\r\n%s\r\n" % (len(_PART), _PART)


@pytest.mark.parametrize(
    "answer",
    [
        response(_CHUNK[:-10], 200, _CHUNKED),
        response(_CHUNK + b"5", 200, _CHUNKED),
        response(_PART + b'data: {"cho'),
        response(_PART + b"data: {bad\n\n"),
        response(b"data: 1\n\n"),
        response(b"data: {}\n\n"),
        response(b'data: {"error": "x"}\n\n'),
    ],
)
def test_a_broken_stream(answer: bytes) -> None:
    with canned_server() as server:
        server.answers = [answer]
        with pytest.raises(ChatClientError):
            list(ChatClient(server.url).stream("tiny", [], None))


@pytest.mark.parametrize(
    "answer",
    [
        *(response(body) for body in (b"<html>", b"{}", b'{"data": []}', b"[]", b"\xff")),
        response(b'{"da', 200, "Content-Length: 100"),
        response(b'{"da', 500, "Content-Length: 100"),
        b"SSH-2.0-OpenSSH_9.9\r\n",
    ],
)
def test_broken_models(answer: bytes) -> None:
    with canned_server() as server:
        server.models = answer
        with pytest.raises(ChatClientError):
            ChatClient(server.url).model_name()


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://h:abc", "http://a b", "http://..", "http://127.0.0.1:1/\u00e9"]
)
def test_a_malformed_address(url: str) -> None:
    with pytest.raises(ChatClientError):
        ChatClient(url).model_name()
