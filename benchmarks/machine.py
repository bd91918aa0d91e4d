"""The machine that a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
