from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from canned_server import canned_server, events, refusing_url, response, text_chunks
from tiny_glm import make_checkpoint
from tiny_tokenizer import write_tokenizer

from nybble.server.commands.cli import main


def _nybble(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    command = [str(Path(sys.executable).with_name("nybble")), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def _exit_code(arguments: Sequence[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_serve_without_its_checkpoint(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    done = _nybble("serve", str(missing), "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"nybble: {missing}: ")


def test_serve_on_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _nybble("serve", str(tmp_path), "--port", str(port))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"nybble: cannot listen on 127.0.0.1:{port}: ")


def test_serve_by_a_split_that_cannot_be(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, vocab_size=288)
    write_tokenizer(tmp_path)
    done = _nybble("serve", str(tmp_path), "--port", "0", "--tensor-parallel-size", "3")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("nybble: the model cannot be split as TP 3")
    assert line.endswith("TP 3 does not divide 4 query heads")


def test_chat_without_a_server() -> None:
    with refusing_url() as url:
        done = _nybble("chat", "--url", url, "--ask", "hi")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"nybble: {url}: cannot be reached: ")


@pytest.mark.parametrize(
    "arguments",
    [["chat", "--url", "nonsense"], ["chat", "--url", "ftp://x", "--ask", "hi"]],
)
def test_chat_with_a_bad_address(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"nybble: {arguments[2]!r} is not an http or https address\n"


@pytest.mark.parametrize("options", [[], ["--temperature", "0.5"]])
def test_chat_asks(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with canned_server() as server:
        server.answers = [response(events(*text_chunks("Par", "is.")))]
        main(["chat", "--url", server.url, "--ask", "Capital of France?", *options])
    assert capsys.readouterr().out.startswith("Paris.\n[")
    assert server.requests[0].get("temperature") == (0.5 if options else None)


def test_chat_converses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    with canned_server() as server:
        main(["chat", "--url", server.url])
    assert capsys.readouterr().out.startswith("tiny. ")


def test_ctrl_c_ends_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    with canned_server() as server:
        assert _exit_code(["chat", "--url", server.url]) == 130


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["serve"], "CHECKPOINT"),
        (["serve", "x", "--port", "abc"], "--port"),
        (["serve", "x", "--dtype", "int4"], "--dtype"),
        (["serve", "x", "--nonsense"], "--nonsense"),
        (["serve", "x", "y"], "y"),
        (["serve", "x", "--checkpoint", "y"], "--checkpoint"),
        (["chat", "--temperature", "hot"], "--temperature"),
        (["chat", "hello"], "hello"),
        (["demo"], "directory"),
        (["demo", "x", "--served-model-name", "y"], "--served-model-name"),
        (["demo-checkpoint"], "directory"),
    ],
)
def test_bad_usage(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert named in captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["serve", "chat", "demo", "demo-checkpoint"]),
        (["serve"], ["CHECKPOINT", "--port", "--max-num-seqs", "--input-price", "(default: 127.0.0.1)"]),
        (["chat"], ["--url", "--ask", "http://127.0.0.1:8000"]),
        (["demo"], ["directory", "--ask", "--wheel", "--port"]),
        (["demo-checkpoint"], ["directory", "--wheel"]),
    ],
)
def test_help(command: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code([*command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert [word for word in words if word not in printed] == []
