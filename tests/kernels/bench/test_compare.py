"""Comparing two results: what is noise, what is a change."""

from __future__ import annotations

import pytest
from bench_shapes import make_report, make_row

from nybble.kernels.bench.cases import BenchCase
from nybble.kernels.bench.compare import compare_reports, comparison_table
from nybble.kernels.bench.report import MODELLED, BenchFileError

CASES = [BenchCase("norm", 1, tokens, "bf16") for tokens in (1, 2, 4)]


def test_noise_is_the_halves_of_both_spreads() -> None:
    before, after = make_row(CASES[0], 10, spread=0.2), make_row(CASES[0], 11, spread=0.1)
    (change,) = compare_reports(make_report(before), make_report(after)).changes
    assert change.noise == pytest.approx(0.15) and change.ratio == pytest.approx(1.1)
    assert not change.is_regression and not change.is_gain


def test_small_spreads_do_not_make_two_percent_a_change() -> None:
    before, after = make_row(CASES[0], 10, spread=0), make_row(CASES[0], 10.15, spread=0)
    assert not compare_reports(make_report(before), make_report(after)).regressions


def test_beyond_the_noise() -> None:
    before = make_report(*(make_row(case, 10, spread=0.02) for case in CASES))
    after = make_report(
        *(make_row(case, us, spread=0.02) for case, us in zip(CASES, (10.5, 9.5, 10.1), strict=True))
    )
    comparison = compare_reports(before, after)
    assert [change.after.case for change in comparison.regressions] == [CASES[0]]
    assert [change.is_gain for change in comparison.changes] == [False, True, False]
    lines = comparison_table(comparison).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["SLOWER", "faster", "(nybble)"]


def test_backends_are_compared_with_themselves() -> None:
    before = make_report(make_row(CASES[0], 10), make_row(CASES[0], 20, backend="flashinfer"))
    after = make_report(make_row(CASES[0], 10), make_row(CASES[0], 40, backend="flashinfer"))
    assert [change.after.backend for change in compare_reports(before, after).regressions] == ["flashinfer"]


def test_what_is_only_in_one() -> None:
    before, after = make_report(make_row(CASES[0])), make_report(make_row(CASES[1]))
    comparison = compare_reports(before, after)
    assert not comparison.changes
    assert comparison.notes == (
        "only before: norm bf16, tp 1, tokens 1 (nybble)",
        "only after: norm bf16, tp 1, tokens 2 (nybble)",
    )


def test_another_machine_is_mentioned() -> None:
    before = make_report(make_row(CASES[0]), device="H100", triton="3.6.0")
    after = make_report(make_row(CASES[0]), device="H200", triton="3.6.0")
    assert compare_reports(before, after).notes == (
        "not the same machine: device is H100 before and H200 after",
    )


def test_measured_and_modelled_do_not_mix() -> None:
    before, after = make_report(make_row(CASES[0])), make_report(make_row(CASES[0], kind=MODELLED))
    with pytest.raises(BenchFileError, match="one of the results is measured"):
        compare_reports(before, after)
