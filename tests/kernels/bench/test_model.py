"""Modelled times, by hand."""

from __future__ import annotations

import pytest

from nybble.kernels.bench.gpu_models import GpuModel
from nybble.kernels.bench.model import FORMULA, LAUNCH_US, model_time
from nybble.kernels.bench.work import Work

GPU = GpuModel("test", 90, multiprocessors=10, clock_ghz=1.0, bandwidth_tbps=1.0, bf16_tflops=100, l2_bytes=1)


@pytest.mark.parametrize(
    ("work", "instructions", "us", "roof_us", "bound"),
    [
        (Work(50_000_000, 100), 1000, 50, 50, "bandwidth"),
        (Work(1000, 8_000_000_000), 1000, 80, 80, "arithmetic"),
        (Work(1_000_000, 100), 1280 * 4_000, 4, 1, "instructions"),
    ],
)
def test_the_largest_of_three(work: Work, instructions: float, us: float, roof_us: float, bound: str) -> None:
    modelled = model_time(work, instructions, 3, GPU)
    assert modelled.us == pytest.approx(us + 3 * LAUNCH_US)
    assert modelled.roof_us == pytest.approx(roof_us)
    assert modelled.bound == bound


def test_the_formula_names_its_numbers() -> None:
    assert f"launches x {LAUNCH_US:g} us" in FORMULA
