"""Modelled times of kernels that were compiled but not run."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.kernels.bench.gpu_models import GpuModel
from nybble.kernels.bench.work import Work

LAUNCH_US = 2.0
FORMULA = (
    "time = max(bytes / bandwidth, instructions / issue rate, matrix flops / bfloat16 peak) "
    f"+ launches x {LAUNCH_US:g} us. Bytes and flops are the least that the op needs. Instructions: those "
    "of a "
    " "
    " "
    ""
    "hot loop for each weight or KV element times their number, counted in the compiled code; where items "
    "are not "
    "counted, each instruction of the kernel once for every thread that is started. Bandwidth, peak and "
    "issue rate "
    "(128 threads a cycle on each multiprocessor) are the data sheet's; the time of a launch is assumed. "
    "Latency, "
    "waves that do not fill the GPU and cache effects are left out, so a measured time will be longer"
)


@dataclass(frozen=True)
class ModelledTime:
    """Microseconds; bound: which of the three is the largest. roof_us: without instructions and launches."""

    us: float
    roof_us: float
    bound: str


def model_time(work: Work, instructions: float, num_launches: int, gpu: GpuModel) -> ModelledTime:
    """`instructions`: of single threads, of all launches."""
    roofs = {
        "bandwidth": work.num_bytes / (gpu.bandwidth_tbps * 1e6),
        "arithmetic": work.flops / (gpu.bf16_tflops * 1e6),
    }
    bounds = roofs | {"instructions": 1e6 * instructions / gpu.instructions_per_second}
    bound = max(bounds, key=lambda name: bounds[name])
    return ModelledTime(bounds[bound] + num_launches * LAUNCH_US, max(roofs.values()), bound)
