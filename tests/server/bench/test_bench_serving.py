"""`nybble bench serving`, from the command line to its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from canned_server import CannedServer, canned_server, events, refusing_url, response, text_chunks

from nybble.server.bench import bench_serving as module
from nybble.server.commands.cli import main

SMALL = ["--num-requests", "3", "--warmup", "1", "--prompt-tokens", "40", "--output-tokens", "5"]


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serving", *arguments])
    return int(str(caught.value.code))


def _answer(num_prompt: int, num_output: int = 5) -> bytes:
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_output}
    return response(events(*text_chunks("a", "b", usage=usage)))


def _whole(num_prompt: int) -> bytes:
    return response(json.dumps({"choices": [], "usage": {"prompt_tokens": num_prompt}}).encode())


def _script(server: CannedServer, *rest: bytes) -> None:
    """Two probes that say that a word is a token, a warm-up, then `rest`."""
    server.answers = [_whole(20), _whole(20 + 256), _answer(40), *rest]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    out = tmp_path / "new"
    with canned_server() as server:
        failing = response(b'{"error": {"message": "too busy"}}', 503)
        _script(server, _answer(40), failing, _answer(41, 7))
        arguments = [*SMALL, "--concurrency", "1", "--slo", "e2e=60000", "ttft=60000"]
        assert _run("--url", server.url, *arguments, "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert "1 at once: 1 failed: HTTP 503: too busy" in printed.out
    assert "40.5 (max 41)" in printed.out and "6.0 (max 7)" in printed.out
    assert server.paths == ["/v1/models", *["/v1/chat/completions"] * 6]
    assert {body["model"] for body in server.requests} == {"tiny"}
    assert [body["max_tokens"] for body in server.requests] == [1, 1, 5, 5, 5, 5]
    prompts = [body["messages"][0]["content"] for body in server.requests]
    assert len(set(prompts)) == 6 and {len(prompt.split()) for prompt in prompts[2:]} == {32}
    text = (out / "results.json").read_text()
    document = json.loads(text)
    assert "very-secret" not in text and document["schema"] == module.SCHEMA
    assert document["options"]["slo"] == {"ttft": 60.0, "tpot": None, "e2e": 60.0}
    (row,) = document["rows"]
    assert row["load"]["concurrency"] == 1 and row["metrics"]["num_finished"] == 2
    assert row["metrics"]["errors"] == {"HTTP 503: too busy": 1}
    assert row["metrics"]["goodput"] == row["metrics"]["requests_per_s"] > 0
    assert row["metrics"]["num_output_tokens"] == 12
    assert (out / "serving.png").read_bytes().startswith(b"\x89PNG")
    assert _run("--compare", str(out / "results.json"), str(out / "results.json")) == 0
    assert "1.000" in capsys.readouterr().out


def test_nothing_answered_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with canned_server() as server:
        _script(server, *[response(b"{}", 500)] * 3)
        assert _run("--url", server.url, *SMALL, "--rate", "1000") == 1
    assert "1000/s: 3 failed: HTTP 500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "0"], "concurrency is 0, expected a number above 0"),
        (["--rate", "inf"], "rate is inf, expected a number above 0"),
        (["--max-seconds", "nan"], "max_seconds is nan, expected a number above 0"),
        (["--num-requests", "0"], "num_requests is 0, expected at least 1"),
        (["--warmup", "-1"], "num_warmups is -1, expected at least 0"),
        (["--url", "nonsense"], "url: 'nonsense' is not an http or https address"),
        (["--slo", "ttft"], "slo is 'ttft', expected ttft=MS"),
        (["--slo", "itl=5"], "slo is 'itl=5', expected ttft=MS"),
        (["--compare", "/nowhere", "/nowhere"], "compare: /nowhere: "),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"nybble: {message}")


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with refusing_url() as url:
        assert _run("--url", url) == 1
        assert f"nybble: {url}/v1/models: <urlopen error" in capsys.readouterr().err
        assert _run("--url", url, "--model", "tiny") == 1
        assert f"nybble: {url}/v1/chat/completions: <urlopen error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (response(b'{"usage": {}}'), "no prompt_tokens in the usage of an answer"),
        (response(b"[]"), "no prompt_tokens in the usage of an answer"),
        (response(b"nonsense"), "/v1/chat/completions: Expecting value"),
        (response(b'{"error": {"message": "unknown field"}}', 400), "HTTP 400: unknown field"),
    ],
)
def test_a_server_that_does_not_count_prompts(
    answer: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with canned_server() as server:
        server.answers = [answer]
        assert _run("--url", server.url, *SMALL) == 1
    assert message in capsys.readouterr().err


def test_a_server_whose_streams_have_no_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """As llama-cpp-python's: what ends for its length is counted, what ends early cannot be."""

    def answer(finish_reason: str) -> bytes:
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}]}
        return response(events(*text_chunks("a", "b"), end))

    with canned_server() as server:
        server.answers = [
            _whole(20),
            _whole(276),
            answer("length"),
            *map(answer, ("length", "stop", "length")),
        ]
        assert _run("--url", server.url, *SMALL, "--concurrency", "1") == 0
    printed = capsys.readouterr().out
    assert " 5 │" in printed
    assert "1 at once: 1 failed: no usage in the stream of an answer that ended early" in printed


def test_a_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with canned_server() as server:
        _script(server, *[_answer(40)] * 3)
        assert _run("--url", server.url, *SMALL, "--concurrency", "1", "--out", str(tmp_path / "file")) == 1
    assert f"out: cannot write to {tmp_path / 'file'}: " in capsys.readouterr().err


def test_a_file_that_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"schema": "other"}')
    assert _run("--compare", str(path), str(path)) == 1
    assert "schema is 'other', expected 'nybble-bench-serving/1'" in capsys.readouterr().err


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "nybble.server.bench.bench_serving_plot", raising=False)
    module.draw_plot([], tmp_path, sys.stdout)
    assert "pip install 'nybble[bench]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
