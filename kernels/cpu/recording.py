"""Operations of a pool that are repeated by one call.

A decode step is some hundred operations, between which Python takes about as long as they do: what it needs
has left the caches whenever its turn comes. A recording repeats operations with the arguments that they had,
so on the same addresses, and with what those hold by then.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable

from torch import Tensor

from nybble.kernels.cpu.native_library import Operation


class _Call(ctypes.Structure):
    """struct nybble_call."""

    _fields_ = (("operation", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class Replay(ctypes.Structure):
    """struct nybble_replay."""

    _fields_ = (("calls", ctypes.c_void_p), ("num_calls", ctypes.c_int64))


class Recording:
    """What `Pool.record` gives, and `Pool.replay` takes.

    Results live as long as it does; what else operations read, weights and inputs, is the caller's to keep.
    """

    def __init__(self) -> None:
        self._operations: list[tuple[Operation, ctypes.Structure]] = []
        self._results: list[Tensor] = []
        self._checks: dict[Hashable, Callable[[], None]] = {}
        self._calls: ctypes.Array[_Call] | None = None

    def add(self, operation: Operation, arguments: ctypes.Structure) -> None:
        self._operations.append((operation, arguments))
        self._calls = None

    def keep(self, result: Tensor) -> None:
        """Have memory that operations write to live as long as the recording."""
        self._results.append(result)

    def add_check(self, key: Hashable, check: Callable[[], None]) -> None:
        """Of what arguments hold, before each replay; once for each key."""
        self._checks.setdefault(key, check)

    def check(self) -> None:
        """Raises ValueError: arguments hold something that an operation must not see."""
        for check in self._checks.values():
            check()

    def replay(self) -> Replay:
        """The arguments of nybble_replay, which are valid until the next `add`."""
        if self._calls is None:
            calls = [
                _Call(ctypes.cast(operation, ctypes.c_void_p), ctypes.addressof(arguments))  # type: ignore[arg-type]
                for operation, arguments in self._operations
            ]
            self._calls = (_Call * len(calls))(*calls)
        return Replay(ctypes.addressof(self._calls), len(self._operations))
