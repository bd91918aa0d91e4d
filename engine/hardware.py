"""The device that the engine runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nybble.engine.errors import OptionError
from nybble.engine.planning.gpu_specs import GIB, GpuSpec
from nybble.engine.ranks.launched_rank import LaunchedRank
from nybble.kernels.cpu.cores import available_cores, default_num_threads


@dataclass(frozen=True)
class Hardware:
    """A rank's device and the bytes of its memory that are free now.

    name, index, capability: of a GPU; its compute capability is times ten
    cores: of the host, for this rank to be bound to, best first; empty where the system does not tell them
    num_cores: how many threads are of use on them
    """

    device: Literal["cpu", "cuda"]
    free_bytes: int
    name: str = ""
    index: int = 0
    capability: int = 0
    cores: tuple[int, ...] = ()
    num_cores: int = 1

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.index) if self.device == "cuda" else torch.device("cpu")

    @property
    def spec(self) -> GpuSpec:
        """As something to plan for. Its bandwidth is not known; no speed is planned."""
        memory = self.free_bytes / GIB
        if self.device == "cpu":
            name = f"CPU with {memory:.1f} GiB free"
            return GpuSpec(name, memory, bandwidth_tbps=1, workspace_gib=1, noun="CPU")
        return GpuSpec(self.name, memory, bandwidth_tbps=1)


def detect(device: Literal["auto", "cpu", "cuda"], launched: LaunchedRank) -> Hardware:
    """The device of a rank; "auto" is a GPU if there is one. Ranks on a CPU share its memory evenly.

    Raises:
        OptionError: a GPU was asked for and there is none, or none left for this rank.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not num_gpus:
        raise OptionError("device is 'cuda', but torch finds no CUDA device on this machine")
    if device == "cpu" or not num_gpus:
        return Hardware(
            device="cpu",
            free_bytes=_available_host_bytes() // launched.num_local_ranks,
            cores=own_cores(available_cores(), launched),
            num_cores=max(1, default_num_threads() // launched.num_local_ranks),
        )
    if launched.local_rank >= num_gpus:
        raise OptionError(
            f"{launched.num_local_ranks} ranks were started on a machine that has {num_gpus} GPUs"
        )
    index = launched.local_rank
    torch.cuda.set_device(index)
    free_bytes, _ = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    return Hardware("cuda", free_bytes, torch.cuda.get_device_name(index), index, 10 * major + minor)


def own_cores(cores: Sequence[int], launched: LaunchedRank) -> tuple[int, ...]:
    """A rank's share of `cores`, in their order; all of them where there are too few.

    Every n-th, so that a core's siblings, which come in the same order after all first ones, are as a rule
    the same rank's.
    """
    if len(cores) < launched.num_local_ranks:
        return tuple(cores)
    return tuple(cores[launched.local_rank :: launched.num_local_ranks])


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
