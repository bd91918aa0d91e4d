"""Memory for weights in huge pages.

A decode step reads every weight once, from end to end. Of pages of 4 KiB a processor looks one up for every
64 lines; where the kernel grants huge pages (transparent_hugepage: madvise or always), for every 32,768.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

_LINE = 64  # bytes: where areas begin
_SLAB_BYTES = 1 << 26


class WeightMemory:
    """Areas one after the other in large mappings, each of which is freed with the last area in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def area(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], uninitialised or zero; pages that nobody writes to cost nothing."""
        padded = -(-num_bytes // _LINE) * _LINE
        with self._lock:
            if padded > len(self._rest):
                self._rest = _mapping(max(padded, _SLAB_BYTES))
            area, self._rest = self._rest[:padded], self._rest[padded:]
        return area[:num_bytes]


def _mapping(num_bytes: int) -> Tensor:
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # of a kernel that has none: small pages do as well, only slower
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)
