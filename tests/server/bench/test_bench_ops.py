"""`nybble bench ops` hands everything to the kernels' program, and draws what that wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.server.bench import bench_ops as module
from nybble.server.bench.bench_ops import bench_ops
from nybble.server.commands.cli import main

Program = Callable[[list[str], dict[str, str]], int]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The program that takes the place of the kernels' own: append it."""
    given: list[Program] = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "nybble.kernels.bench.program"]
        return subprocess.CompletedProcess(command, given[0](command[3:], env))

    monkeypatch.setattr(module.subprocess, "run", run)
    return given


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    directories: list[Path] = []
    monkeypatch.setattr(module, "draw_plots", directories.append)
    return directories


def test_arguments_and_exit_code_pass_through(
    programs: list[Program], drawn: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen: list[Any] = []
    programs.append(lambda arguments, env: seen.append((arguments, "TRITON_INTERPRET" in env)) or 3)
    assert bench_ops(["--quick", "--op", "experts"]) == 3
    assert seen == [(["--quick", "--op", "experts"], False)] and not drawn


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--tp", "1", "8", "--out", "x"], ["--compare", "a", "b"], []]
)
def test_the_command(arguments: list[str], programs: list[Program], drawn: list[Path]) -> None:
    seen: list[list[str]] = []
    programs.append(lambda given, env: seen.append(given) or 0)  # type: ignore[func-returns-value]
    with pytest.raises(SystemExit) as caught:
        main(["bench", "ops", *arguments])
    assert caught.value.code == 0 and seen == [arguments]


def test_new_results_are_drawn(programs: list[Program], drawn: list[Path], tmp_path: Path) -> None:
    def write(arguments: list[str], env: dict[str, str]) -> int:
        (tmp_path / "results.json").write_text("{}")
        return 1

    programs.append(write)
    assert bench_ops(["--quick", "--out", str(tmp_path)]) == 1
    assert drawn == [tmp_path]


def test_old_results_are_not(programs: list[Program], drawn: list[Path], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    programs.append(lambda arguments, env: 2)
    assert bench_ops([f"--out={tmp_path}"]) == 2
    assert not drawn


def test_out_without_a_directory_is_the_program_s_to_say(programs: list[Program], drawn: list[Path]) -> None:
    programs.append(lambda arguments, env: 2)
    assert bench_ops(["--out"]) == 2 and not drawn


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "nybble.server.bench.bench_plots", raising=False)
    (tmp_path / "results.json").write_text(json.dumps({"rows": []}))
    module.draw_plots(tmp_path)
    captured = capsys.readouterr()
    assert captured.err.startswith("no plots: ") and "pip install 'nybble[bench]'" in captured.err
    assert captured.out == ""
