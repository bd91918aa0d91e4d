"""Every kernel of ours is started here: so launches can be counted, and compiled with no GPU.

Launchers follow the rules of CUDA graphs: they read nothing back from the device and take no shape from
its data. So they also run on meta tensors, which have shapes and no data: inside `recorded_launches` a
whole forward pass says what it would launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_recording: ContextVar[list[KernelLaunch] | None] = ContextVar("recording", default=None)


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel with its grid, its arguments by position and its constants and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start `kernel[grid](*arguments, **options)`; options are its constants, num_warps and num_stages.

    Floating-point contraction is asked for by name, since Triton's default for it is about to change.
    """
    if 0 in grid:
        return
    launches = _recording.get()
    if launches is not None:
        launches.append(KernelLaunch(kernel, grid, arguments, options))
    else:
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


@contextmanager
def recorded_launches() -> Iterator[list[KernelLaunch]]:
    """Inside, kernels are not started but noted, in order."""
    launches: list[KernelLaunch] = []
    token = _recording.set(launches)
    try:
        yield launches
    finally:
        _recording.reset(token)
