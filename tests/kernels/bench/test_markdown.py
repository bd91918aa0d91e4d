"""Results as text."""

from __future__ import annotations

from bench_shapes import make_report, make_row

from nybble.kernels.bench.cases import BenchCase
from nybble.kernels.bench.markdown import omission_line, progress_line, summary
from nybble.kernels.bench.report import MODELLED, BenchReport, Omission

EXPERTS = BenchCase("experts", 8, 16, "nvfp4", "zipf")
NORM = BenchCase("norm", 1, 1, "bf16")


def test_a_table_for_each_op() -> None:
    rows = make_row(EXPERTS), make_row(EXPERTS, 20.0, backend="vllm marlin"), make_row(NORM)
    page = summary(make_report(*rows, device="H100"))
    assert "* device: H100\n" in page and "modelled" not in page
    experts, norm = page.split("## experts")[1].split("## norm")
    assert f"| {EXPERTS.name} | nybble | 10.0 us | 9.5 - 10.5 | 2 | 4.0 | 50.0% | 1 | 1.0e-03 |" in experts
    assert (
        f"| {EXPERTS.name} | vllm marlin | 20.0 us | 19.0 - 21.0 | 1 | 2.0 | 25.0% | - | 1.0e-03 |" in experts
    )
    assert NORM.name in norm


def test_modelled_times_say_so_everywhere() -> None:
    row = make_row(NORM, kind=MODELLED)
    page = summary(make_report(row))
    assert page.startswith("# Kernel benchmark of GLM-4.7 (modelled, nothing was measured)\n")
    assert "10.0 us modelled" in page
    assert "(modelled)" in progress_line(row)


def test_cases_that_are_missing_for_one_reason_stand_together() -> None:
    reason = "flashinfer cannot be imported: No module named 'flashinfer'"
    missing = [Omission(f"case {number}", "flashinfer", reason) for number in range(5)]
    fault = Omission("norm", "nybble", "wrong", is_fault=True)
    page = summary(BenchReport({}, {}, {}, (), (*missing, fault)))
    faults, skipped = page.split("## Not in the tables")[1].strip().splitlines()
    assert faults == "* **fault**, nybble: wrong (norm)"
    assert skipped == f"* skipped, flashinfer: {reason} (case 0; case 1; case 2; and 2 more)"


def test_spills_are_listed() -> None:
    page = summary(make_report(make_row(NORM, stack_bytes=8), make_row(EXPERTS)))
    assert page.split("## Kernels that spill registers")[1].split() == ["*", *NORM.name.split()]


def test_lines() -> None:
    assert progress_line(make_row(EXPERTS)).endswith(f"1 launches  {EXPERTS.name}  instructions/item 2.50")
    assert "[flashinfer]" in progress_line(make_row(EXPERTS, backend="flashinfer"))
    assert omission_line(Omission("a", "b", "c", is_fault=True)) == "FAULT: a [b]: c"
