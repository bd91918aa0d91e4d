"""A pool of threads, which runs the operations of the native library."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from nybble.kernels.cpu.cores import available_cores
from nybble.kernels.cpu.native_library import NativeLibrary, Operation, native_library
from nybble.kernels.cpu.recording import Recording, Replay

_NO_MEMORY, _OTHER_PROCESS = 1, 2  # of nybble_status in nybble_cpu.h


class Pool:
    """Threads that work together on one operation at a time, with one level's kernels.

    The thread that calls is one of them. Where there is a core for each, the others are bound to one. A
    thread without work sleeps after a tenth of a millisecond.
    """

    def __init__(
        self,
        num_threads: int,
        level: str | None = None,
        library: NativeLibrary | None = None,
        cores: Sequence[int] | None = None,
    ) -> None:
        """level: one of the library's levels, by default the fastest; library: by default the installed one;
        cores: to bind threads to, by default all that the process may use.

        Raises:
            NativeLibraryError: there is none.
            ValueError: an argument is out of range.
            OSError: threads cannot be had.
        """
        self.library = library or native_library()
        self.level = level or self.library.levels[-1]
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be 1 or more")
        if self.level not in self.library.levels:
            raise ValueError(f"level is {self.level!r}; this machine has {', '.join(self.library.levels)}")
        self.num_threads = num_threads
        own_cores = list(available_cores() if cores is None else cores)
        is_bound = len(own_cores) >= num_threads
        self._process = os.getpid()
        self._handle = self.library.create_pool(
            num_threads, self.level, own_cores[:num_threads] if is_bound else None
        )
        if not self._handle:
            raise OSError(
                f"a pool of {num_threads} threads cannot be made: no memory, or the limit of threads"
            )
        self._recording: Recording | None = None
        self._close = weakref.finalize(self, self.library.destroy_pool, self._handle)
        self._close.atexit = False  # the process ends its threads, and one of them may be in an operation

    def operation(self, name: str, arguments: type[ctypes.Structure]) -> Operation:
        """An operation of the library, for `run`."""
        return self.library.operation(name, arguments)

    def run(self, operation: Operation, arguments: ctypes.Structure) -> None:
        """Call an operation, which waits for others that use the pool.

        Raises:
            MemoryError: there is none for what the operation needs beside its arguments.
            RuntimeError: the pool is closed, or of a process that this one was forked from.
        """
        if not self._handle:
            raise RuntimeError("the pool is closed")
        status = operation(self._handle, arguments)
        if status:
            raise _error(status, self._process)
        if self._recording is not None:
            self._recording.add(operation, arguments)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result of an operation, uninitialised."""
        result = torch.empty(shape, dtype=dtype)
        if self._recording is not None:
            self._recording.keep(result)
        return result

    def before_replay(self, key: Hashable, check: Callable[[], None]) -> None:
        """Repeat a check, which was made of what arguments hold, before each replay: once for each key."""
        if self._recording is not None:
            self._recording.add_check(key, check)

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Records the operations that run meanwhile, and their results' memory. By one thread at a time."""
        assert self._recording is None, "a recording within a recording"
        self._recording = Recording()
        try:
            yield self._recording
        finally:
            self._recording = None

    def replay(self, recording: Recording) -> None:
        """Repeat all operations of a recording of this pool in one call.

        Raises:
            ValueError: arguments hold by now what an operation must not see; none has run.
            MemoryError, RuntimeError: as `run`.
        """
        recording.check()
        self.run(self.operation("nybble_replay", Replay), recording.replay())

    def close(self) -> None:
        """End the threads, when no operation runs. Once is enough; a pool that is dropped does so too."""
        self._handle = 0
        self._close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _error(status: int, process: int) -> Exception:
    if status == _NO_MEMORY:
        return MemoryError("no memory for an operation of the native CPU backend")
    assert status == _OTHER_PROCESS, status
    return RuntimeError(f"the pool has its threads in process {process}: a forked process must make its own")
