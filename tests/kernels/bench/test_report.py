"""Results as JSON and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_shapes import make_report, make_row

from nybble.kernels.bench.cases import BenchCase
from nybble.kernels.bench.report import SCHEMA, BenchFileError, BenchReport, Omission, read_report

EXPERTS = BenchCase("experts", 8, 16, "nvfp4", "zipf")
ATTENTION = BenchCase("attention", 1, 8, "fp8", context=8192)


def test_what_is_derived() -> None:
    row = make_row(EXPERTS, 10.0)
    assert row.gb_per_s == pytest.approx(2.0)
    assert row.tflop_per_s == pytest.approx(4.0)
    assert row.roof_fraction == pytest.approx(0.5)


def test_there_and_back(tmp_path: Path) -> None:
    omission = Omission(ATTENTION.name, "flashinfer", "flashinfer cannot be imported")
    fault = Omission(EXPERTS.name, "nybble", "wrong", is_fault=True)
    report = BenchReport({"device": "X"}, {}, {}, (make_row(EXPERTS), make_row(ATTENTION)), (omission, fault))
    path = tmp_path / "results.json"
    path.write_text(report.to_json())
    assert read_report(path) == report
    assert report.faults == [fault]


def test_what_stands_in_the_file() -> None:
    document = json.loads(make_report(make_row(EXPERTS), device="X").to_json())
    assert document["schema"] == SCHEMA and document["machine"] == {"device": "X"}
    (row,) = document["rows"]
    assert row["name"] == EXPERTS.name and row["launches"] == 1
    assert row["repro"].endswith("--tokens 16 --format nvfp4 --routing zipf")
    assert row["roof_fraction"] == 0.5 and row["kernels"][0]["registers"] == 64


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "nybble-bench-ops/99"}', '{"rows": []}'])
def test_other_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(BenchFileError, match=str(path)):
        read_report(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BenchFileError, match="No such file"):
        read_report(tmp_path / "missing.json")
