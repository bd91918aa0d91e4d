from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from nybble.engine.machine import describe_machine, processor_name


def test_processor_name_is_the_kernel_s() -> None:
    assert processor_name() and processor_name() in Path("/proc/cpuinfo").read_text()


def test_description() -> None:
    machine = describe_machine()
    assert machine["processor"] == processor_name()
    assert 1 <= int(machine["cores"]) <= (os.cpu_count() or 1)
    assert machine["torch_threads"] == torch.get_num_threads()
    assert (machine["python"], machine["torch"]) == (platform.python_version(), torch.__version__)
    assert ("gpu" in machine) == torch.cuda.is_available()
