"""The native library built together with the probe of the pool, and that probe."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import native_build

from nybble.kernels.cpu.native_library import NativeLibrary
from nybble.kernels.cpu.pool import Pool

_BUILD = native_build.ROOT / "build" / "native"


@cache
def probe_path() -> Path:
    path = _BUILD / "probe.so"
    native_build.build(path, _BUILD / "probe", extra_files=[Path(__file__).with_name("pool_probe.c")])
    return path


@cache
def probe_library() -> NativeLibrary:
    return NativeLibrary(probe_path())


class _Arguments(ctypes.Structure):
    """struct nybble_probe."""

    _fields_ = (
        ("counts", ctypes.c_void_p),
        ("thread_parts", ctypes.c_void_p),
        ("cores", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
        ("num_parts", ctypes.c_int32),
        ("num_regions", ctypes.c_int32),
        ("busy_microseconds", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Probed:
    """counts: how often each part ran; thread_parts: parts of each thread; cores: where each thread ran."""

    counts: list[int]
    thread_parts: list[int]
    cores: list[int]


def probe(
    pool: Pool, num_parts: int, num_regions: int = 1, busy_microseconds: int = 0, scratch_bytes: int = 0
) -> Probed:
    counts = (ctypes.c_int * max(1, num_parts))()
    thread_parts = (ctypes.c_int * pool.num_threads)()
    cores = (ctypes.c_int * pool.num_threads)(*[-1] * pool.num_threads)
    addresses = [ctypes.addressof(array) for array in (counts, thread_parts, cores)]
    arguments = _Arguments(*addresses, scratch_bytes, num_parts, num_regions, busy_microseconds)
    pool.run(pool.operation("nybble_probe", _Arguments), arguments)
    return Probed(list(counts)[:num_parts], list(thread_parts), list(cores))
