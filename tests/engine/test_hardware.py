from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.engine import hardware
from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware, detect

MEMINFO = "MemTotal:       32768 kB\nMemFree:         1024 kB\nMemAvailable:   20480 kB\nBuffers: 5 kB\n"
AVAILABLE = 20480 * 1024

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Sets what the kernel and CUDA say. `gpu`: free and total bytes; `cgroup`: limit and usage,
    of which 1,000 bytes are page cache."""

    def set_up(
        meminfo: str = MEMINFO, cgroup: tuple[str, str] | None = None, gpu: tuple[int, int] | None = None
    ) -> None:
        files = {"/proc/meminfo": meminfo}
        if cgroup is not None:
            names = ("memory.max", "memory.current", "memory.stat")
            content = (*cgroup, "anon 3000\ninactive_file 700\nactive_file 300\n")
            files |= {f"/sys/fs/cgroup/{name}": text for name, text in zip(names, content, strict=True)}
        for name, content in files.items():
            (tmp_path / name[1:]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name[1:]).write_text(content)
        monkeypatch.setattr(hardware, "Path", lambda name: tmp_path / name[1:])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: gpu)

    return set_up


def test_a_host_without_limits(machine: Machine) -> None:
    machine()
    assert detect("auto") == detect("cpu") == Hardware("cpu", AVAILABLE)


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
    assert detect("cpu").free_bytes == expected


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_is_taken_if_there_is_one(device: str, machine: Machine) -> None:
    machine(gpu=(70, 80))
    assert detect(device) == Hardware("cuda", 70)  # type: ignore[arg-type]


def test_the_host_is_taken_if_asked_for(machine: Machine) -> None:
    machine(gpu=(70, 80))
    assert detect("cpu") == Hardware("cpu", AVAILABLE)


def test_a_gpu_that_is_not_there_is_an_error(machine: Machine) -> None:
    machine()
    with pytest.raises(OptionError, match="no CUDA device"):
        detect("cuda")


def test_a_kernel_that_does_not_say(machine: Machine) -> None:
    machine(meminfo="MemTotal: 5 kB\n")
    with pytest.raises(OptionError, match="/proc/meminfo"):
        detect("cpu")


def test_this_machine_has_memory() -> None:
    assert 1 << 20 < detect("cpu").free_bytes < 1 << 50
