"""The benchmark as a program: exit codes, files, what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_shapes import make_report, make_row

from nybble.kernels.bench import program
from nybble.kernels.bench.cases import BenchCase
from nybble.kernels.bench.program import main, write
from nybble.kernels.bench.report import BenchReport, Omission, read_report

NORM = BenchCase("norm", 1, 1, "bf16")


def saved(path: Path, median_us: float) -> str:
    path.write_text(make_report(make_row(NORM, median_us)).to_json())
    return str(path)


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = saved(tmp_path / "a.json", 10), saved(tmp_path / "b.json", 20)
    assert main(["--compare", before, after]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main(["--compare", after, before]) == 0
    assert main(["--compare", before, before]) == 0


def test_compare_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--compare", saved(tmp_path / "a.json", 10), str(tmp_path / "b.json")]) == 2
    assert capsys.readouterr().err.startswith(f"nybble bench ops: {tmp_path / 'b.json'}: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine with no GPU")
def test_tune_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tune", str(tmp_path / "table.json")]) == 2
    assert "--tune needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--op", "norm", "--format", "nvfp4"]) == 2
    assert "no case is selected" in capsys.readouterr().err


def test_interpreted_kernels_have_no_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--static", "--op", "norm"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_files(tmp_path: Path) -> None:
    report = make_report(make_row(NORM))
    write(report, tmp_path / "new" / "out")
    assert read_report(tmp_path / "new" / "out" / "results.json") == report
    assert (tmp_path / "new" / "out" / "summary.md").read_text().startswith("# Kernel benchmark")


@pytest.mark.parametrize(("is_fault", "code"), [(False, 0), (True, 1)])
def test_a_fault_is_the_exit_code(is_fault: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    omission = Omission(NORM.name, "nybble", "because", is_fault)
    report = BenchReport({}, {}, {}, (make_row(NORM),), (omission,))
    monkeypatch.setattr(program, "_model", lambda cases, options: report)
    assert main(["--static", "--op", "norm"]) == code


def test_cases_for_which_there_is_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(program, "static_results", lambda cases, *rest: (make_row(case) for case in cases))
    assert main(["--static", "--op", "norm", "--tokens", "1", "2", "--seconds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "norm bf16, tp 1, tokens 1" in lines[-2]
    assert lines[-1] == "skipped: norm bf16, tp 1, tokens 2 [nybble]: not begun within 0 seconds"
