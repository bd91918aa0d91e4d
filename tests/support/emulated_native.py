"""`pytest -p emulated_native`: tests of the native library run against one for ARM, in an emulator.

scripts/check_arm builds it, and the program that calls its operations (emulated_calls.c). Python and torch
stay on this machine: of each call they send the memory that its arguments point to, and get it back.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import struct
import subprocess
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import native_build
from torch import Tensor

from nybble.kernels.cpu import native_library
from nybble.kernels.cpu.native_library import NativeLibrary, Operation

_FOLDER = native_build.ROOT / "build" / "native" / "arm"
_COMMAND = ("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", str(_FOLDER / "emulated_calls"))
_LINE = 64
# Bytes of memory that is sent whole, so that what is written beside a tensor is seen. Of larger memory, which
# may be what many weights share, only the tensor is.
_SMALL = 1 << 20


def pytest_configure() -> None:
    """Let all that loads the native library call this one."""
    native_library.LIBRARY = _FOLDER / "native.so"
    native_library.NativeLibrary = EmulatedLibrary  # type: ignore[misc]
    gc.collect()
    gc.freeze()  # so that what a test makes is found soon


def pytest_unconfigure() -> None:
    gc.unfreeze()


class EmulatedLibrary(NativeLibrary):
    """A pool's handle is the number of its threads: the emulator has one pool for each."""

    def __init__(self, path: Path) -> None:
        self.levels = ("portable",)
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            (*_COMMAND, str(path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        atexit.register(self._process.communicate)  # an end of requests, which ends it
        self._digest = self._take(64).decode()

    def sources_digest(self) -> str:
        return self._digest

    def operation(self, name: str, arguments: type[ctypes.Structure]) -> Operation:
        return lambda handle, given: self._call(name, handle, given)

    def create_pool(self, num_threads: int, level: str, cores: list[int] | None) -> int:
        return num_threads

    def destroy_pool(self, handle: int) -> None:
        pass

    def _call(self, name: str, num_threads: int, arguments: ctypes.Structure) -> int:
        areas, pointers = _reached(arguments)
        before = [ctypes.string_at(area.start, area.size) for area in areas]
        sizes = [struct.pack("qq", area.size, area.start % _LINE) for area in areas]
        header = struct.pack("64sqqq", name.encode(), num_threads, len(areas), len(pointers))
        with self._lock:
            self._give([header, *sizes, *(struct.pack("qqqq", *pointer) for pointer in pointers), *before])
            status: int = struct.unpack("q", self._take(8))[0]
            after = [self._take(area.size) for area in areas]
        for area, old, new in zip(areas, before, after, strict=True):
            if not isinstance(area.owner, ctypes.Structure) and new != old:
                ctypes.memmove(area.start, new, area.size)
        return status

    def _give(self, parts: list[bytes]) -> None:
        assert self._process.stdin
        self._process.stdin.write(b"".join(parts))
        self._process.stdin.flush()

    def _take(self, size: int) -> bytes:
        assert self._process.stdout
        taken = self._process.stdout.read(size)
        if len(taken) < size:
            raise RuntimeError(f"the emulator ended with status {self._process.wait()}")
        return taken


@dataclass(frozen=True)
class _Area:
    start: int
    size: int
    owner: Tensor | ctypes.Structure


def _reached(arguments: ctypes.Structure) -> tuple[list[_Area], list[tuple[int, int, int, int]]]:
    """The arguments and what they point to, over any number of structures; and struct pointer of
    emulated_calls.c for each of those pointers."""
    memory = sorted(_live_memory(), key=lambda area: (area.start, area.size))
    starts = [area.start for area in memory]
    areas = [_Area(ctypes.addressof(arguments), ctypes.sizeof(arguments), arguments)]
    pointers = []
    for number, area in enumerate(areas):  # which grows
        if not isinstance(area.owner, ctypes.Structure):
            continue
        for at in _pointers_of(type(area.owner)):
            address = ctypes.c_void_p.from_address(area.start + at).value
            if address is None:
                continue
            before = reversed(memory[: bisect_right(starts, address)])
            target = next(found for found in before if address < found.start + found.size)
            if target not in areas:
                areas.append(target)
            pointers.append((number, at, areas.index(target), address - target.start))
    return areas, pointers


def _live_memory() -> Iterator[_Area]:
    for value in gc.get_objects():
        if issubclass(type(value), Tensor) and value.device.type == "cpu" and value.numel():
            storage = value.untyped_storage()
            if storage.nbytes() <= _SMALL:
                yield _Area(storage.data_ptr(), storage.nbytes(), value)
            elif value.is_contiguous():
                yield _Area(value.data_ptr(), value.nbytes, value)
        elif issubclass(type(value), ctypes.Structure):
            yield _Area(ctypes.addressof(value), ctypes.sizeof(value), value)


def _pointers_of(kind: type[ctypes.Structure], at: int = 0) -> Iterator[int]:
    """Where a structure has pointers."""
    for name, field, *_ in kind._fields_:
        offset = at + getattr(kind, name).offset
        if issubclass(field, ctypes.Structure):
            yield from _pointers_of(field, offset)
        elif field is ctypes.c_void_p or issubclass(field, ctypes._Pointer):
            yield offset
