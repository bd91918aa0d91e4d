"""Small things that tests of the kernel benchmark share."""

from __future__ import annotations

from nybble.kernels.bench.cases import BenchCase, ModelShape
from nybble.kernels.bench.report import MEASURED, OURS, BenchReport, KernelInfo, Row
from nybble.kernels.bench.timing import Run
from nybble.kernels.ops import AttentionShape

TINY = ModelShape(
    hidden=128,
    heads=AttentionShape(num_heads=4, num_kv_heads=2, head_dim=32, rotary_dim=16),
    num_experts=6,
    top_k=2,
    expert_width=64,
    dense_width=128,
    vocabulary=300,
)


def make_row(
    case: BenchCase,
    median_us: float = 10.0,
    *,
    spread: float = 0.1,
    backend: str = OURS,
    kind: str = MEASURED,
    stack_bytes: int = 0,
) -> Row:
    """p10 and p90 are `spread` of the median apart."""
    half = median_us * spread / 2
    return Row(
        case=case,
        backend=backend,
        kind=kind,
        median_us=median_us,
        p10_us=median_us - half,
        p90_us=median_us + half,
        num_bytes=20_000,
        flops=40_000_000,
        roof_us=5.0,
        start="graph",
        max_error=0.01,
        rms_error=0.001,
        kernels=(KernelInfo("_some_kernel", 64, stack_bytes, 1024, 4, 2.5),),
        repro=f"nybble bench ops {case.options}",
    )


def make_report(*rows: Row, **machine: str) -> BenchReport:
    return BenchReport(machine, {"times": "by hand"}, {"copy_gb_per_s": 4.0}, rows, ())


class FakeStopwatch:
    """Runs each workload once, and reads off the times that it was given, again and again."""

    def __init__(self, *times: float) -> None:
        self._times = times
        self.loaded: list[Run] = []

    def load(self, run: Run) -> str:
        self.loaded.append(run)
        run()
        return "fake"

    def times(self, count: int) -> list[float]:
        return [self._times[i % len(self._times)] for i in range(count)]
