from __future__ import annotations

import json
from pathlib import Path

import pytest
from aot_process import run_ahead_of_time

from nybble.kernels.compiled.resource_check import check, reports
from nybble.kernels.compiled.resource_report import Case, ReportError


def test_cases_are_compiled_for_each_architecture(tmp_path: Path) -> None:
    arches = ("--arch", "80", "90")
    done = run_ahead_of_time("-m", "aot_cases", str(tmp_path), "--update", *arches, cache=tmp_path / "triton")
    assert done.returncode == 0, done.stdout + done.stderr
    matmul = "matmul 16 tokens: _matmul_kernel"
    for arch, matrix in ((80, "HMMA.16816.F32.BF16"), (90, "HGMMA.64x16x16.F32.BF16")):
        golden = json.loads((tmp_path / f"resources-sm_{arch}.json").read_text())
        assert golden["arch"] == arch
        assert set(golden["kernels"]) == {matmul, "sum: _sum_kernel"}
        hot_loop = golden["kernels"][matmul]["hot_loop"]
        assert list(hot_loop["matrix"]) == [matrix] and hot_loop["passes"] == 1
        assert f"sm_{arch}\n" in done.stdout and f"{matmul}  {matrix}\n" in done.stdout


def no_cases(arch: int) -> list[Case]:
    return []


def test_golden_files_are_written_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--arch", "90"]
    assert check(no_cases, arguments) == 1
    assert "sm_90: there is no golden file" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert check(no_cases, [*arguments, "--update"]) == 0
    assert check(no_cases, arguments) == 0


def test_a_difference_from_the_golden_file_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--arch", "90"]
    check(no_cases, [*arguments, "--update"])
    path = tmp_path / "resources-sm_90.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kernels": {"case: kernel": {}}}))
    assert check(no_cases, arguments) == 1
    assert "sm_90, case: kernel: only in the golden file" in capsys.readouterr().out


def twins(arch: int) -> list[Case]:
    return [Case("twin", lambda: None), Case("twin", lambda: None)]


def test_cases_are_told_apart_by_their_names() -> None:
    with pytest.raises(ReportError, match="same name"):
        next(reports(twins, [90], 1))
