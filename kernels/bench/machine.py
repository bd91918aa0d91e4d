"""The machine that times were taken on, and the roofs that it was seen to reach."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import torch

from nybble.kernels.bench.timing import Stopwatch, measure

_COPIED_BYTES = 1 << 30
_MATRIX = 8192
_QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def describe_software(triton_version: str) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton_version,
        "cuda": torch.version.cuda,
    }


def describe_gpu() -> dict[str, Any]:
    """The current CUDA device; what the driver's tool says of it if there is one."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / (1 << 30), 1),
        "l2_mib": round(properties.L2_cache_size / (1 << 20), 1),
    } | _driver_fields()


def _driver_fields() -> dict[str, str]:
    index = str(torch.cuda.current_device())
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    names = _QUERY.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def measure_roofs(stopwatch: Stopwatch, device: torch.device) -> dict[str, float]:
    """GB/s of a copy (bytes read and written), TFLOP/s of a large bfloat16 product, and what is in every
    time: microseconds of a graph whose one kernel does next to nothing."""
    source = torch.ones(_COPIED_BYTES // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = measure(stopwatch, lambda: target.copy_(source))
    left = torch.randn(_MATRIX, _MATRIX, device=device).bfloat16()
    right = torch.randn(_MATRIX, _MATRIX, device=device).bfloat16()
    product = measure(stopwatch, lambda: left @ right)
    small = torch.ones(1, device=device)
    least = measure(stopwatch, lambda: small.add_(1))
    return {
        "copy_gb_per_s": 2 * _COPIED_BYTES / copy.median / 1e3,
        "matmul_tflop_per_s": 2 * _MATRIX**3 / product.median / 1e6,
        "least_us": least.median,
    }


def roof_us(num_bytes: int, flops: int, roofs: dict[str, float]) -> float:
    """The least time that the measured roofs allow."""
    by_bandwidth = num_bytes / roofs["copy_gb_per_s"] / 1e3
    return max(by_bandwidth, flops / roofs["matmul_tflop_per_s"] / 1e6)
