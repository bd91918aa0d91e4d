"""Measuring with a fake stopwatch: what gets a time, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bench_shapes import TINY, FakeStopwatch
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.bench import measured
from nybble.kernels.bench.cases import BenchCase
from nybble.kernels.bench.correctness import ROUNDED_ONCE, deviation
from nybble.kernels.bench.measured import Bench, measured_results
from nybble.kernels.bench.report import KernelInfo, Omission, Row
from nybble.kernels.bench.workload import Peer, PeerMissingError, Workload, as_tensor
from nybble.kernels.triton.launch import KernelLaunch

NORM = BenchCase("norm", 1, 3, "bf16")
EXPECTED = torch.arange(1.0, 9.0)


def read_kernel(launch: KernelLaunch) -> KernelInfo:
    return KernelInfo(launch.kernel.__name__, 40, 0, 512, launch.options["num_warps"])


def make_bench(stopwatch: FakeStopwatch, free_bytes: int = 1 << 40) -> Bench:
    roofs = {"copy_gb_per_s": 1000.0, "matmul_tflop_per_s": 100.0}
    return Bench(TINY, DEVICE, ARCHES[0], stopwatch, roofs, free_bytes, read_kernel)


def given(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], Tensor], *peers: Peer
) -> tuple[list[Row | Omission], FakeStopwatch]:
    """The results of a case whose kernels are `run`."""
    workload = Workload(run, as_tensor, lambda output: deviation(output, EXPECTED), ROUNDED_ONCE, peers)
    monkeypatch.setattr(measured, "make_workload", lambda *arguments: workload)
    stopwatch = FakeStopwatch(9.0, 10.0, 11.0)
    return list(measured_results(NORM, make_bench(stopwatch))), stopwatch


def test_a_case_of_ours() -> None:
    stopwatch = FakeStopwatch(2.0)
    (row,) = measured_results(NORM, make_bench(stopwatch))
    assert isinstance(row, Row)
    assert (row.kind, row.backend, row.median_us, row.start) == ("measured", "nybble", 2.0, "fake")
    assert row.roof_us == pytest.approx(row.num_bytes / 1e6)
    assert row.rms_error is not None and row.rms_error < 0.01
    assert [kernel.name for kernel in row.kernels] == ["_residual_rms_norm_kernel"]
    assert row.repro == "nybble bench ops --op norm --tp 1 --tokens 3 --format bf16"


def test_a_wrong_result_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    (fault,), stopwatch = given(monkeypatch, lambda: EXPECTED * 1.1)
    assert isinstance(fault, Omission) and fault.is_fault
    assert fault.reason.startswith("wrong: largest error")
    assert not stopwatch.loaded


def test_memory_that_is_not_written_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    (fault,), _ = given(monkeypatch, lambda: torch.cat([EXPECTED[:-1], torch.empty(1)]))
    assert isinstance(fault, Omission) and "largest error inf" in fault.reason


def test_what_cannot_run_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Tensor:
        raise RuntimeError("out of resources\nand more")

    (fault,), _ = given(monkeypatch, run)
    assert fault == Omission(NORM.name, "nybble", "RuntimeError: out of resources", is_fault=True)


def test_what_an_architecture_lacks_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Tensor:
        raise ValueError("no conversion")

    (omission,), _ = given(monkeypatch, run)
    assert omission == Omission(NORM.name, "nybble", "no conversion")


def test_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Callable[[], Tensor]:
        raise PeerMissingError("not installed")

    def broken() -> Callable[[], Tensor]:
        raise TypeError("another version")

    peers = (
        Peer("good", lambda: lambda: EXPECTED),
        Peer("wrong", lambda: lambda: EXPECTED + 1),
        Peer("coarse", lambda: lambda: EXPECTED + 1, replace(ROUNDED_ONCE, max_error=1, rms_error=1)),
        Peer("missing", missing),
        Peer("broken", broken),
    )
    (ours, good, wrong, coarse, absent, other), stopwatch = given(monkeypatch, lambda: EXPECTED, *peers)
    assert isinstance(ours, Row) and isinstance(good, Row) and isinstance(coarse, Row)
    assert (good.backend, good.kernels, good.median_us) == ("good", (), 10.0)
    assert isinstance(wrong, Omission) and wrong.reason.startswith("wrong: ") and not wrong.is_fault
    assert absent == Omission(NORM.name, "missing", "not installed")
    assert other == Omission(NORM.name, "broken", "TypeError: another version")
    assert len(stopwatch.loaded) == 3


def test_peers_are_left_out_when_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload(
        lambda: EXPECTED,
        as_tensor,
        lambda output: deviation(output, EXPECTED),
        ROUNDED_ONCE,
        (Peer("good", lambda: lambda: EXPECTED),),
    )
    monkeypatch.setattr(measured, "make_workload", lambda *arguments: workload)
    bench = replace(make_bench(FakeStopwatch(1.0)), with_peers=False)
    assert len(list(measured_results(NORM, bench))) == 1


def test_a_cache_that_does_not_fit() -> None:
    case = BenchCase("attention", 1, 128, "bf16", context=202_752)
    (omission,) = measured_results(case, make_bench(FakeStopwatch(1.0), free_bytes=1 << 20))
    assert omission == Omission(case.name, "nybble", "its cache does not fit in this GPU's memory")
