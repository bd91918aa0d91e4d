"""The device that the engine runs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nybble.engine.errors import OptionError


@dataclass(frozen=True)
class Hardware:
    """A device and the bytes of its memory that are free now."""

    device: Literal["cpu", "cuda"]
    free_bytes: int


def detect(device: Literal["auto", "cpu", "cuda"]) -> Hardware:
    """The device asked for; "auto" is a GPU if there is one.

    Raises:
        OptionError: a GPU was asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise OptionError("device is 'cuda', but torch finds no CUDA device on this machine")
    if has_gpu and device != "cpu":
        free_bytes, _ = torch.cuda.mem_get_info()
        return Hardware(device="cuda", free_bytes=free_bytes)
    return Hardware(device="cpu", free_bytes=_available_host_bytes())


def _available_host_bytes() -> int:
    """The kernel's estimate of what can be allocated without swapping, within a cgroup's limit."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _cgroup_free_bytes())
    raise OptionError("/proc/meminfo does not say how much memory is available")


def _cgroup_free_bytes() -> int:
    limit, usage = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.exists() or not usage.exists() or limit.read_text().strip() == "max":
        return 1 << 62
    # Page cache counts as usage but is given up when memory is wanted.
    statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    reclaimable = int(statistics["inactive_file"]) + int(statistics["active_file"])
    return int(limit.read_text()) - int(usage.read_text()) + reclaimable
