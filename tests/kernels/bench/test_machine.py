"""Roofs from a fake stopwatch; a machine's description."""

from __future__ import annotations

import pytest
import torch
from bench_shapes import FakeStopwatch

from nybble.kernels.bench import machine
from nybble.kernels.bench.machine import describe_gpu, describe_software, measure_roofs, roof_us

ROOFS = {"copy_gb_per_s": 2000.0, "matmul_tflop_per_s": 500.0, "least_us": 3.0}


def test_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "_MATRIX", 64)
    roofs = measure_roofs(FakeStopwatch(10.0), torch.device("cpu"))
    assert roofs == {
        "copy_gb_per_s": pytest.approx(2 * (1 << 20) / 10e-6 / 1e9),
        "matmul_tflop_per_s": pytest.approx(2 * 64**3 / 10e-6 / 1e12),
        "least_us": 10.0,
    }


@pytest.mark.parametrize(("num_bytes", "flops", "us"), [(4_000_000, 0, 2.0), (8, 1_500_000_000, 3.0)])
def test_the_higher_roof_counts(num_bytes: int, flops: int, us: float) -> None:
    assert roof_us(num_bytes, flops, ROOFS) == pytest.approx(us)


def test_software() -> None:
    assert describe_software("3.9.0")["triton"] == "3.9.0"
    assert describe_software("3.9.0")["torch"] == torch.__version__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu() -> None:
    fields = describe_gpu()
    assert fields["device"] == torch.cuda.get_device_name() and fields["l2_mib"] > 0
