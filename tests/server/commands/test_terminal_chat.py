from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
from canned_server import CannedServer, canned_server, events, refusing_url, response, text_chunks

from nybble.server.commands.chat_client import ChatClient, ChatClientError
from nybble.server.commands.terminal_chat import ask, converse

REFUSAL = response(json.dumps({"error": {"message": "the context is full"}}).encode(), 400)


@pytest.fixture
def server() -> Iterator[CannedServer]:
    with canned_server() as server:
        yield server


def _answer(*pieces: str) -> bytes:
    usage = {"prompt_tokens": 5, "completion_tokens": len(pieces)}
    return response(events(*text_chunks(*pieces, usage=usage)))


def _converse(
    server: CannedServer, monkeypatch: pytest.MonkeyPatch, lines: str, temperature: float | None = None
) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    out = io.StringIO()
    converse(ChatClient(server.url), temperature, out)
    return out.getvalue()


def _contents(server: CannedServer) -> list[list[str]]:
    """The messages of each request, without their roles."""
    return [[message["content"] for message in request["messages"]] for request in server.requests]


def test_ask_prints_answer_and_speed(server: CannedServer) -> None:
    server.answers = [_answer("Par", "is.")]
    out = io.StringIO()
    ask(ChatClient(server.url), "Capital of France?", 0.5, out)
    answer, speed = out.getvalue().splitlines()
    assert answer == "Paris."
    assert speed.startswith("[5 prompt tokens, 2 tokens of answer, ")
    (request,) = server.requests
    assert (request["model"], request["temperature"]) == ("tiny", 0.5)
    assert request["messages"] == [{"role": "user", "content": "Capital of France?"}]


def test_ask_raises(server: CannedServer) -> None:
    server.answers = [REFUSAL]
    with pytest.raises(ChatClientError, match="the context is full"):
        ask(ChatClient(server.url), "x", None, io.StringIO())


def test_a_conversation_remembers(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [_answer("A", "1"), _answer("A2")]
    printed = _converse(server, monkeypatch, "Q1\nQ2\n", temperature=0.25)
    assert _contents(server) == [["Q1"], ["Q1", "A1", "Q2"]]
    assert [message["role"] for message in server.requests[1]["messages"]] == ["user", "assistant", "user"]
    assert [request["temperature"] for request in server.requests] == [0.25, 0.25]
    assert printed.startswith("tiny. Type a message")
    assert "A1\n[" in printed
    assert "A2\n[" in printed


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _thinking_answer(field: str) -> bytes:
    deltas = [{field: "Let me "}, {field: "see."}, {"content": "Par"}, {"content": "is."}]
    return response(events(*({"choices": [{"index": 0, "delta": delta}]} for delta in deltas)))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_terminal_shows_thoughts_dim(server: CannedServer, field: str) -> None:
    server.answers = [_thinking_answer(field)] * 2
    terminal, file = _Terminal(), io.StringIO()
    ask(ChatClient(server.url), "Capital of France?", None, terminal)
    assert terminal.getvalue().startswith("\x1b[2mLet me see.\x1b[0m\n\nParis.\n[")
    ask(ChatClient(server.url), "Capital of France?", None, file)
    assert file.getvalue().startswith("Paris.\n[")


def test_a_thought_that_never_ends_is_not_dim_for_ever(server: CannedServer) -> None:
    server.answers = [response(events({"choices": [{"index": 0, "delta": {"reasoning": "Hm"}}]}))]
    terminal = _Terminal()
    ask(ChatClient(server.url), "?", None, terminal)
    assert terminal.getvalue().startswith("\x1b[2mHm\x1b[0m\n\n\n[")


def test_thoughts_go_back_with_their_turns(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [_thinking_answer("reasoning_content"), _answer("A2")]
    _converse(server, monkeypatch, "Q1\nQ2\n")
    turn = {"role": "assistant", "content": "Paris.", "reasoning_content": "Let me see."}
    assert server.requests[1]["messages"][1] == turn


def test_new_starts_over(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [_answer("A1"), _answer("A2")]
    _converse(server, monkeypatch, "Q1\n/new\nQ2\n")
    assert _contents(server) == [["Q1"], ["Q2"]]


@pytest.mark.parametrize("lines", ["", "/quit\n", "/quit", "  /quit \nQ1\n", "/new\n/quit\nQ1\n", "\n \n"])
def test_leaving_without_a_question(
    server: CannedServer, monkeypatch: pytest.MonkeyPatch, lines: str
) -> None:
    _converse(server, monkeypatch, lines)
    assert server.requests == []


def test_a_line_without_its_end_is_a_question(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [_answer("A1")]
    _converse(server, monkeypatch, "  Q1 ")
    assert _contents(server) == [["Q1"]]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (REFUSAL, "the context is full"),
        (response(events(*text_chunks("half"), done=False)), "the answer broke off"),
        (response(events({"error": {"message": "the engine stopped"}})), "the engine stopped"),
    ],
)
def test_a_failed_question_is_forgotten(
    server: CannedServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: bytes,
    message: str,
) -> None:
    server.answers = [_answer("A1"), failure, _answer("A3")]
    _converse(server, monkeypatch, "Q1\nQ2\nQ3\n")
    assert _contents(server) == [["Q1"], ["Q1", "A1", "Q2"], ["Q1", "A1", "Q3"]]
    assert capsys.readouterr().err == f"\n{message}\n"


def test_an_unreachable_server_ends_it_at_the_start() -> None:
    with refusing_url() as url, pytest.raises(ChatClientError, match="cannot be reached"):
        converse(ChatClient(url), None, io.StringIO())
