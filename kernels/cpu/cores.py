"""Which cores this process may use, and how many threads are of use on them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> list[int]:
    """Logical cores that this process may run on: one of each physical core, then their siblings.

    Empty where the system does not tell (macOS).
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    return siblings_last(sorted(os.sched_getaffinity(0)), _TOPOLOGY)


def default_num_threads() -> int:
    """One for each physical core that this process may run on, and no more than its container's quota."""
    cores = available_cores()
    if not cores:
        return os.cpu_count() or 1
    physical = {physical_core(core, _TOPOLOGY) for core in cores}
    return max(1, min(len(physical), cpu_quota(_QUOTA)))


def siblings_last(cores: Iterable[int], topology: Path) -> list[int]:
    """First the first core of each physical one, then all second ones, and so on."""
    seen: dict[str, int] = {}
    ranks: list[tuple[int, int]] = []
    for core in cores:
        physical = physical_core(core, topology)
        ranks.append((seen.get(physical, 0), core))
        seen[physical] = seen.get(physical, 0) + 1
    return [core for _, core in sorted(ranks)]


def physical_core(core: int, topology: Path) -> str:
    """A name that logical cores of one physical core share: the list of them, or its own number."""
    try:
        return (topology / f"cpu{core}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(core)


def cpu_quota(path: Path) -> int:
    """Cores' worth of time that a container may use (cgroup v2), rounded up; all if there is no limit."""
    try:
        quota, period = path.read_text().split()
    except OSError:
        quota, period = "max", ""
    if quota == "max":
        return os.cpu_count() or 1
    return math.ceil(int(quota) / int(period))
