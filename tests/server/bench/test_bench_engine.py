"""`nybble bench engine`, from the command line to its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_glm import make_checkpoint
from tiny_tokenizer import write_tokenizer

from nybble.server.bench import bench_engine as module
from nybble.server.commands.cli import main

SMALL = ["--batch-sizes", "1", "3", "--prompt-lengths", "20", "--output-lengths", "4", "1", "--repeat", "2"]


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "engine", *arguments])
    return int(str(caught.value.code))


def test_the_null_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert _run("--model", "null", *SMALL, "--queued", "5", "--out", str(tmp_path / "new")) == 0
    printed = capsys.readouterr()
    rows = [line.split("│")[1:4] for line in printed.out.splitlines() if line.startswith("│")]
    cases = [[1, 20, 4], [3, 20, 4], [1, 20, 1], [3, 20, 1]]
    assert [[int(cell) for cell in row] for row in rows] == cases
    assert module.METHOD in printed.out.replace("\n", "").replace("  ", " ")
    assert (tmp_path / "new" / "engine.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "new" / "results.json").read_text())
    assert document["schema"] == module.SCHEMA
    assert document["machine"]["processor"] and document["method"]["repeats"] == 2
    assert document["config"]["checkpoint"] == "null" and document["config"]["scheduler"]["max_num_seqs"] == 3
    assert [row["case"]["batch"] for row in document["rows"]] == [1, 3, 1, 3]
    assert all(row["case"]["num_queued"] == 5 for row in document["rows"])
    assert document["rows"][2]["inter_token_latency"] is None
    stats = document["rows"][1]["stats"]
    assert stats["num_prompt_tokens"] == 3 * 3 * 20 and stats["num_finished"] == {"length": 9, "abort": 15}
    assert "3 x (20 + 4) with 5 queued: a step has 3.0 sequences" in printed.out


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path, vocab_size=288)
    write_tokenizer(tmp_path)
    assert _run("--model", str(tmp_path), "--kv-cache-memory", "0.02", *SMALL) == 0
    assert "│     3 │     20 │      4 │" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "0"], "batch_sizes is 0, expected at least 1"),
        (["--output-lengths", "0"], "output_lengths is 0, expected at least 1"),
        (["--repeat", "0"], "repeat is 0, expected at least 1"),
        (["--warmup", "-1"], "warmup is -1, expected at least 0"),
        (["--queued", "-1"], "queued is -1, expected at least 0"),
        (["--prompt-lengths", "202752"], "1 x (202752 + 64): 202816 tokens exceed max_model_len = 202752"),
        (["--model", "/nowhere"], "/nowhere: "),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--model", "null", *arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"nybble: {message}")


def test_a_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert _run("--model", "null", *SMALL, "--out", str(tmp_path / "file")) == 1
    assert f"out: cannot write to {tmp_path / 'file'}: " in capsys.readouterr().err


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "nybble.server.bench.bench_engine_plot", raising=False)
    module.draw_plot([], tmp_path, sys.stdout)
    captured = capsys.readouterr()
    assert captured.err.startswith("no plot: ") and "pip install 'nybble[bench]'" in captured.err
    assert not list(tmp_path.iterdir())
