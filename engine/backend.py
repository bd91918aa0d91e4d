"""The one place where an implementation of the model's operations is chosen."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch

from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware
from nybble.kernels.arithmetic import PLAIN
from nybble.kernels.cpu.cpu_ops import CpuOps
from nybble.kernels.cpu.native_library import NativeLibraryError, native_library
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.invariant_arithmetic import InvariantArithmetic
from nybble.kernels.ops import Ops
from nybble.kernels.reference_ops import ReferenceOps
from nybble.kernels.triton.launch_table import (
    LaunchTable,
    LaunchTableError,
    default_launch_table,
    load_launch_table,
)

logger = logging.getLogger("nybble.engine")

# Compute capabilities, times ten, that the Triton kernels are tuned for. Others run as the one below: 8.9 as
# 8.0, 10.3 as 10.0, 12.1 as 12.0.
_TUNED = (80, 90, 100, 120)
_INTERPRETED_AS = 90
MAX_CPU_THREADS = 1024
_OLDEST_WITH_FP8 = 90  # Triton has no conversion from E4M3 below 8.9, which runs as 8.0


Backend = Literal["reference", "cpu", "triton"]


def resolve_backend(config: EngineConfig, hardware: Hardware) -> Backend:
    """Settle "auto".

    Raises:
        OptionError: a backend was asked for and there is nothing that it can run on.
    """
    backend = _automatic_backend(config, hardware) if config.backend == "auto" else config.backend
    if backend == "cpu":
        _check_native_cpu(config, hardware)
    if backend == "triton" and hardware.capability < _TUNED[0] and not _is_interpreted():
        found = f"{hardware.name} has {hardware.capability / 10}" if hardware.capability else "there is none"
        raise OptionError(
            f"backend is 'triton', which needs a GPU of compute capability 8.0 or more: {found}"
        )
    return backend


def _automatic_backend(config: EngineConfig, hardware: Hardware) -> Backend:
    if hardware.capability >= _TUNED[0]:
        return "triton"
    if hardware.device != "cpu" or config.dtype == "bfloat16":
        return "reference"
    try:
        native_library()
    except NativeLibraryError as error:
        logger.warning("backend is 'reference', which is slower than 'cpu': %s", error)
        return "reference"
    return "cpu"


def _check_native_cpu(config: EngineConfig, hardware: Hardware) -> None:
    if hardware.device != "cpu":
        raise OptionError(f"backend is 'cpu', but device is {hardware.device!r}: set device to 'cpu'")
    if config.dtype == "bfloat16":
        raise OptionError("dtype is 'bfloat16', but backend 'cpu' computes in float32")
    try:
        native_library()
    except NativeLibraryError as error:
        raise OptionError(f"backend is 'cpu': {error}") from error


def resolve_cpu_threads(config: EngineConfig, hardware: Hardware) -> int | None:
    """Settle the threads of a config whose backend is settled; None for all backends but "cpu".

    Raises:
        OptionError: it is out of range, or set for another backend.
    """
    asked = config.cpu_threads
    if config.backend != "cpu":
        if asked is not None:
            raise OptionError(f"cpu_threads is {asked}, but backend is {config.backend!r}, not 'cpu'")
        return None
    if asked is not None and not 1 <= asked <= MAX_CPU_THREADS:
        raise OptionError(f"cpu_threads is {asked}, expected 1 to {MAX_CPU_THREADS}")
    return asked or hardware.num_cores


def make_ops(config: EngineConfig, hardware: Hardware) -> Ops[Any]:
    """The backend of a resolved config.

    Raises OSError if its threads cannot be had.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    if config.backend == "cpu":
        pool = Pool(config.cpu_threads or hardware.num_cores, cores=hardware.cores)
        return CpuOps(pool)
    if config.backend != "triton":
        return ReferenceOps(dtype, InvariantArithmetic() if config.deterministic else PLAIN)
    # Here, since Triton is not for every platform, and takes a second to import.
    from nybble.kernels.triton.launch_policy import ADAPTIVE, invariant_policy
    from nybble.kernels.triton.triton_ops import TritonOps

    policy = invariant_policy() if config.deterministic else ADAPTIVE
    has_table = config.launch_table != "none"
    table = _load_launch_table(Path(config.launch_table)) if has_table else LaunchTable()
    return TritonOps(dtype, _kernel_arch(hardware), policy, table)


def resolve_launch_table(config: EngineConfig, hardware: Hardware) -> str:
    """Settle "auto" for a config whose backend is settled: a path, or "none".

    Raises:
        OptionError: a table was asked for that cannot be used, or was measured on another GPU; or there is
            one where `--tune` puts it, and it cannot be read.
    """
    if config.backend != "triton" or config.launch_table == "none":
        return "none"
    is_asked_for = config.launch_table != "auto"
    path = Path(config.launch_table) if is_asked_for else default_launch_table()
    if not is_asked_for and not path.exists():
        return "none"
    table = _load_launch_table(path)
    if table.device == hardware.name:
        return str(path)
    if is_asked_for:
        raise OptionError(f"launch_table is {path}, measured on {table.device!r}: this is {hardware.name!r}")
    logger.warning("%s is for %s, not for %s: it is left aside", path, table.device, hardware.name)
    return "none"


def _load_launch_table(path: Path) -> LaunchTable:
    from nybble.kernels.triton.launch_choice import TUNABLE_OPS

    try:
        return load_launch_table(path, TUNABLE_OPS)
    except LaunchTableError as error:
        raise OptionError(f"launch_table: {error}; write it anew, or set it to 'none'") from error


def resolve_kv_cache_dtype(
    config: EngineConfig, hardware: Hardware, is_fp8_declared: bool
) -> Literal["fp32", "bf16", "fp8"]:
    """Settle "auto" for a config whose backend and dtype are settled.

    Triton kernels read an FP8 cache faster, so there the checkpoint decides. The others, which widen it
    first, take one when asked. Native code keeps bfloat16, half of what it would have to read in float32.

    Raises:
        OptionError: an FP8 cache was asked for and the GPU has no conversion from it.
    """
    can_read_fp8 = config.backend != "triton" or _kernel_arch(hardware) >= _OLDEST_WITH_FP8
    asked = config.cache.kv_cache_dtype
    if asked == "fp8" and not can_read_fp8:
        raise OptionError(
            f"kv_cache_dtype is 'fp8', which the Triton backend reads on compute capability 9.0 or more: "
            f"{hardware.name} has {hardware.capability / 10}"
        )
    if asked != "auto":
        return asked
    if is_fp8_declared and can_read_fp8 and config.backend == "triton":
        return "fp8"
    return "fp32" if config.dtype == "float32" and config.backend != "cpu" else "bf16"


def _kernel_arch(hardware: Hardware) -> int:
    """The architecture that kernels are launched as for."""
    capability = hardware.capability or _INTERPRETED_AS
    return max(arch for arch in _TUNED if arch <= capability)


def _is_interpreted() -> bool:
    """Triton's own switch, with which kernels run on a CPU, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
