from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from nybble.engine import hardware
from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware, detect
from nybble.engine.planning.gpu_specs import GIB
from nybble.engine.ranks.launched_rank import LaunchedRank

MEMINFO = "MemTotal:       32768 kB\nMemFree:         1024 kB\nMemAvailable:   20480 kB\nBuffers: 5 kB\n"
AVAILABLE = 20480 * 1024
ALONE = LaunchedRank()

Machine = Callable[..., None]


class Gpus:
    """GPUs of which number n has `free` + n bytes free, as torch tells of them."""

    def __init__(self, count: int, free: int) -> None:
        self.count = count
        self.free = free
        self.current = 0

    def set_device(self, index: int) -> None:
        self.current = index

    def mem_get_info(self) -> tuple[int, int]:
        return self.free + self.current, 1 << 50


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Sets what the kernel and CUDA say. `cgroup`: limit and usage, of which 1,000 bytes are page cache."""

    def set_up(
        meminfo: str = MEMINFO,
        cgroup: tuple[str, str] | None = None,
        num_gpus: int = 0,
        free: int = 70,
        cores: tuple[int, ...] = (),
    ) -> None:
        files = {"/proc/meminfo": meminfo}
        if cgroup is not None:
            names = ("memory.max", "memory.current", "memory.stat")
            texts = (*cgroup, "anon 3000\ninactive_file 700\nactive_file 300\n")
            files |= {f"/sys/fs/cgroup/{name}": text for name, text in zip(names, texts, strict=True)}
        for name, text in files.items():
            (tmp_path / name[1:]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name[1:]).write_text(text)
        gpus = Gpus(num_gpus, free)
        monkeypatch.setattr(hardware, "Path", lambda name: tmp_path / name[1:])
        monkeypatch.setattr(hardware, "available_cores", lambda: list(cores))
        monkeypatch.setattr(hardware, "default_num_threads", lambda: max(1, len(cores) // 2))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", gpus.set_device)
        monkeypatch.setattr(torch.cuda, "mem_get_info", gpus.mem_get_info)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 1))

    return set_up


def test_ranks_share_the_cores(machine: Machine) -> None:
    """Four physical cores and their siblings: a rank has a core's sibling, too."""
    machine(cores=(0, 1, 2, 3, 4, 5, 6, 7))
    alone = detect("cpu", ALONE)
    assert (alone.cores, alone.num_cores) == ((0, 1, 2, 3, 4, 5, 6, 7), 4)
    ranks = [detect("cpu", LaunchedRank(n, 2, n, 2)) for n in range(2)]
    assert [(rank.cores, rank.num_cores) for rank in ranks] == [((0, 2, 4, 6), 2), ((1, 3, 5, 7), 2)]


def test_more_ranks_than_cores_have_them_all(machine: Machine) -> None:
    machine(cores=(5, 9))
    rank = detect("cpu", LaunchedRank(3, 4, 3, 4))
    assert (rank.cores, rank.num_cores) == ((5, 9), 1)


def test_a_host_without_limits(machine: Machine) -> None:
    machine()
    assert detect("auto", ALONE) == detect("cpu", ALONE) == Hardware("cpu", AVAILABLE)


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        (("max\n", "500\n"), AVAILABLE),
        (("10000\n", "4000\n"), 7000),
        ((f"{1 << 50}\n", "4000\n"), AVAILABLE),
    ],
)
def test_a_cgroup_limits_the_host(cgroup: tuple[str, str], expected: int, machine: Machine) -> None:
    machine(cgroup=cgroup)
    assert detect("cpu", ALONE).free_bytes == expected


def test_ranks_share_the_memory_of_their_host(machine: Machine) -> None:
    """Of six ranks, three are on another machine."""
    machine()
    ranks = [LaunchedRank(rank, 6, rank - 3, 3) for rank in (3, 4, 5)]
    assert {detect("cpu", rank).free_bytes for rank in ranks} == {AVAILABLE // 3}


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_is_taken_if_there_is_one(device: Literal["auto", "cuda"], machine: Machine) -> None:
    machine(num_gpus=1)
    assert detect(device, ALONE) == Hardware("cuda", 70, "GPU number 0", 0, capability=121)


def test_each_rank_takes_a_gpu_of_its_machine(machine: Machine) -> None:
    machine(num_gpus=4)
    found = [detect("auto", LaunchedRank(rank, 8, rank - 4, 4)) for rank in (4, 5, 6, 7)]
    assert found == [Hardware("cuda", 70 + n, f"GPU number {n}", n, 121) for n in range(4)]
    assert found[2].torch_device == torch.device("cuda", 2)


def test_more_ranks_than_gpus_are_refused(machine: Machine) -> None:
    machine(num_gpus=2)
    assert detect("auto", LaunchedRank(1, 3, 1, 3)).index == 1
    with pytest.raises(OptionError, match="3 ranks were started on a machine that has 2 GPUs"):
        detect("auto", LaunchedRank(2, 3, 2, 3))


def test_the_host_is_taken_if_asked_for(machine: Machine) -> None:
    machine(num_gpus=1)
    assert detect("cpu", ALONE) == Hardware("cpu", AVAILABLE)
    assert detect("cpu", ALONE).torch_device == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_an_error(machine: Machine) -> None:
    machine()
    with pytest.raises(OptionError, match="no CUDA device"):
        detect("cuda", ALONE)


def test_a_kernel_that_does_not_say(machine: Machine) -> None:
    machine(meminfo="MemTotal: 5 kB\n")
    with pytest.raises(OptionError, match="/proc/meminfo"):
        detect("cpu", ALONE)


def test_this_machine_has_memory() -> None:
    assert 1 << 20 < detect("cpu", ALONE).free_bytes < 1 << 50


def test_a_gpu_is_planned_for_with_its_workspace() -> None:
    spec = Hardware("cuda", 80 * GIB + 5, "H100", 3).spec
    assert (spec.name, spec.memory_bytes, spec.usable_bytes) == ("H100", 80 * GIB + 5, 76 * GIB + 5)


def test_of_a_host_a_gib_stays_free() -> None:
    spec = Hardware("cpu", 20 * GIB).spec
    assert (spec.name, spec.memory_bytes, spec.usable_bytes) == ("CPU with 20.0 GiB free", 20 * GIB, 19 * GIB)
