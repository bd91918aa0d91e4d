"""`pytest -p sanitized_native`: tests of the native library run against one that was built with sanitizers.

scripts/check_native builds it, with the probe of the pool, and has the sanitizers' runtime loaded, since
Python is not built with them. It also runs this as a program, which must not get away with reading past a
tensor's end.
"""

from __future__ import annotations

import native_build
import native_pool
import torch

from nybble.kernels.cpu import add_rms_norm, native_library
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.ops import RmsNorm

LIBRARY = native_build.ROOT / "build" / "native" / "sanitized.so"


def pytest_configure() -> None:
    """Let all that loads the native library load this one."""
    native_library.LIBRARY = LIBRARY
    native_pool.probe_path = lambda: LIBRARY


def overrun() -> None:
    """Have a weight read that is shorter than it should be."""
    add_rms_norm.pointer = lambda name, tensor, dtype, shape: tensor.data_ptr()
    with Pool(1, library=native_library.load_library(LIBRARY, native_library.SOURCES)) as pool:
        add_rms_norm.add_rms_norm(pool, torch.zeros(1, 64), None, RmsNorm(torch.zeros(60), 1e-6))


if __name__ == "__main__":
    overrun()
