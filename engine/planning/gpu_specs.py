"""GPUs that capacity is planned for: memory that a process can use, and peak memory bandwidth.

Memory is what CUDA or ROCm reports as total, rounded down to whole GiB, for a GPU that nothing else runs
on. Bandwidth is the vendor's peak, which no kernel reaches. Nothing here was measured by this project; a
GPU that is not listed, or one of which more is known, is described by its two numbers (`custom_gpus`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nybble.engine.errors import OptionError

GIB = 1 << 30
MAX_GPUS = 256  # beyond any deployment of one replica; guards the search for splits


@dataclass(frozen=True)
class GpuSpec:
    """`memory_gib`: what a process can have, in GiB of 2^30 bytes; `bandwidth_tbps`: in TB/s of 10^12 bytes.

    `workspace_gib`, of the memory: activations, communication buffers, CUDA context and graphs. `noun`: what
    messages call one.
    """

    name: str
    memory_gib: float
    bandwidth_tbps: float
    workspace_gib: float = 4
    noun: str = "GPU"

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def workspace_bytes(self) -> int:
        return int(self.workspace_gib * GIB)

    @property
    def usable_bytes(self) -> int:
        """For weights and KV cache."""
        return self.memory_bytes - self.workspace_bytes


@dataclass(frozen=True)
class GpuSet:
    """`count` equal GPUs."""

    count: int
    gpu: GpuSpec

    def __str__(self) -> str:
        return f"{self.count} x {self.gpu.name}"


KNOWN_GPUS = (
    # nvidia-smi: 81,559 MiB (modal-client PR 2797), of which CUDA has 79; data sheet, SXM: 3.35 TB/s.
    GpuSpec("H100 80GB", 79, 3.35),
    # 141 GB, about 139 GiB (not seen in a primary source); data sheet: 4.8 TB/s.
    GpuSpec("H200", 139, 4.8),
    # CUDA: 178.35 GiB; 7,680 bits at 3,996 MHz, double rate = 7.67 (pytorch/ao PR 4002); data sheet: 7.7
    # (aiconfigurator PR 1246). The often quoted 8 TB/s is the rounded figure.
    GpuSpec("B200", 178, 7.7),
    # 288 GB, about 268 GiB (not seen in a primary source); 7.75 TB/s (aiconfigurator PR 1246).
    GpuSpec("B300", 268, 7.75),
    # nvidia-smi: 81,920 MiB (modal-client PR 2797), of which CUDA has 79; data sheet, SXM: 2,039 GB/s.
    GpuSpec("A100 80GB", 79, 2.039),
    # 96 GB, about 95 GiB (not seen in a primary source); data sheet: 1,792 GB/s.
    GpuSpec("RTX PRO 6000", 95, 1.792),
    # nvidia-smi: 32,607 MiB (club-3090 issue 1229); torch: 31.5 GiB (onediff PR 1041); data sheet:
    # 1,792 GB/s.
    GpuSpec("RTX 5090", 31, 1.792),
    # 128 GB shared with the host: of CUDA's 121.7 GiB, 101.3 to 102.2 are free after boot (MiaAI-Lab,
    # GLM-5.3-Flash-EXL3-2x-DGX-Sparks issue 47); data sheet: 273 GB/s.
    GpuSpec("GB10", 101, 0.273),
    # Eight stacks of 24 GiB, less what the driver keeps (not seen in a primary source); data sheet: 5.3 TB/s.
    GpuSpec("MI300X", 191, 5.3),
)

# Other ways to write a name; the key has no spaces, hyphens or underscores.
_ALIASES = {
    "h100": "H100 80GB",
    "a100": "A100 80GB",
    "rtxpro6000blackwell": "RTX PRO 6000",
    "dgxspark": "GB10",
}


def format_gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f}"


def parse_gpus(text: str) -> GpuSet:
    """A set written as "8xH100", "4 x RTX PRO 6000" or just "B300"; case and spacing do not matter.

    Raises:
        OptionError: the count is out of range, or the GPU is not known.
    """
    match = re.fullmatch(r"(?:(\d{1,9})\s*[x*]\s*)?(\S.*)", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError(f"gpus is {text!r}, expected a count and a name, as in 8xH100")
    return GpuSet(_checked_count(int(match[1] or 1)), _find(match[2]))


def custom_gpus(memory_gib: float, bandwidth_tbps: float, count: int) -> GpuSet:
    """GPUs described by their numbers: usable GiB and TB/s of each.

    Raises:
        OptionError: a number is not positive and finite, or the count is out of range.
    """
    for name, value in (("memory", memory_gib), ("bandwidth", bandwidth_tbps)):
        if not 0 < value < math.inf:
            raise OptionError(f"{name} is {value}, expected a positive number")
    name = f"GPU of {memory_gib:g} GiB, {bandwidth_tbps:g} TB/s"
    return GpuSet(_checked_count(count), GpuSpec(name, memory_gib, bandwidth_tbps))


def select_gpus(
    gpus: str | None, memory_gib: float | None, bandwidth_tbps: float | None, count: int | None
) -> GpuSet:
    """The set that the command line describes, in either of its two ways.

    Raises:
        OptionError: both ways or neither were used, or as `parse_gpus` and `custom_gpus`.
    """
    if gpus is not None:
        if (memory_gib, bandwidth_tbps, count) != (None, None, None):
            raise OptionError("gpus already says count, memory and bandwidth: give either it or those")
        return parse_gpus(gpus)
    if memory_gib is None or bandwidth_tbps is None:
        raise OptionError("which GPUs? give gpus, as in 8xH100, or both memory and bandwidth of one GPU")
    return custom_gpus(memory_gib, bandwidth_tbps, 1 if count is None else count)


def _find(name: str) -> GpuSpec:
    key = _key(name)
    by_key = {_key(gpu.name): gpu for gpu in KNOWN_GPUS}
    gpu = by_key.get(_key(_ALIASES.get(key, name)))
    if gpu is None:
        known = ", ".join(gpu.name for gpu in KNOWN_GPUS)
        raise OptionError(f"GPU {name!r} is not known; known are {known}; or give memory and bandwidth")
    return gpu


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


def _checked_count(count: int) -> int:
    if not 1 <= count <= MAX_GPUS:
        raise OptionError(f"{count} GPUs: expected 1 to {MAX_GPUS}")
    return count
