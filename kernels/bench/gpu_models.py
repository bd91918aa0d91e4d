"""GPUs for which times are modelled where none is at hand.

Nothing here was measured by this project. Peaks are dense, of bfloat16 with float32 sums, from the vendor's
data sheets; clocks are those at which the multiprocessors give that peak, and the kernels' instructions are
counted at the same clock. Bandwidths are those of engine/planning/gpu_specs.py, which names their sources.
"""

from __future__ import annotations

from dataclasses import dataclass

ISSUE_LANES = 128  # of a multiprocessor: four schedulers start an instruction of 32 threads each in a cycle


@dataclass(frozen=True)
class GpuModel:
    """arch: compute capability times ten; l2_bytes: of the whole GPU."""

    name: str
    arch: int
    multiprocessors: int
    clock_ghz: float
    bandwidth_tbps: float
    bf16_tflops: float
    l2_bytes: int

    @property
    def instructions_per_second(self) -> float:
        """Of single threads."""
        return self.multiprocessors * ISSUE_LANES * self.clock_ghz * 1e9


GPU_MODELS = (
    # A100 data sheet, SXM 80 GB: 312 TFLOP/s; whitepaper: 108 multiprocessors at 1.41 GHz, 40 MB of L2 cache.
    GpuModel("A100 80GB", 80, 108, 1.41, 2.039, 312, 40 << 20),
    # H100 data sheet, SXM: 989.4 TFLOP/s, which are 132 multiprocessors at 1.83 GHz; whitepaper: 50 MB of L2
    # cache.
    GpuModel("H100 80GB", 90, 132, 1.83, 3.35, 989.4, 50 << 20),
    # H200 data sheet: the H100's multiprocessors with other memory.
    GpuModel("H200", 90, 132, 1.83, 4.8, 989.4, 50 << 20),
    # HGX B200 data sheet: 2.25 PFLOP/s; 148 multiprocessors (hmc-tech.com lists them, and 1.86 GHz).
    GpuModel("B200", 100, 148, 1.86, 7.7, 2250, 126 << 20),
    # RTX PRO 6000 Blackwell: 503.8 TFLOP/s of 188 multiprocessors at 2.617 GHz (hmc-tech.com), 128 MB of L2
    # cache.
    GpuModel("RTX PRO 6000", 120, 188, 2.617, 1.792, 503.8, 128 << 20),
    # RTX Blackwell whitepaper, RTX 5090: 209.5 TFLOP/s with float32 sums, 170 multiprocessors at 2.407 GHz,
    # 96 MB.
    GpuModel("RTX 5090", 120, 170, 2.407, 1.792, 209.5, 96 << 20),
)


def find_gpu_model(name: str) -> GpuModel:
    """By name, of which the memory may be left out: "h100". Raises ValueError."""
    key = _key(name)
    for model in GPU_MODELS:
        if key in (_key(model.name), _key(model.name.removesuffix(" 80GB"))):
            return model
    known = ", ".join(model.name for model in GPU_MODELS)
    raise ValueError(f"GPU {name!r} is not known; known are {known}")


def _key(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").replace("_", "")
