"""The one place where an implementation of the model's operations is chosen."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch

from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware
from nybble.kernels.ops import Ops
from nybble.kernels.reference_ops import ReferenceOps

# Compute capabilities, times ten, that the Triton kernels are tuned for. Others run as the one below: 8.9 as
# 8.0, 10.3 as 10.0, 12.1 as 12.0.
_TUNED = (80, 90, 100, 120)
_INTERPRETED_AS = 90


def resolve_backend(config: EngineConfig, hardware: Hardware) -> Literal["reference", "triton"]:
    """Settle "auto".

    Raises:
        OptionError: Triton was asked for and there is nothing that it can run on.
    """
    if config.backend == "auto":
        return "triton" if hardware.capability >= _TUNED[0] else "reference"
    if config.backend == "triton" and hardware.capability < _TUNED[0] and not _is_interpreted():
        found = f"{hardware.name} has {hardware.capability / 10}" if hardware.capability else "there is none"
        raise OptionError(
            f"backend is 'triton', which needs a GPU of compute capability 8.0 or more: {found}"
        )
    return config.backend


def make_ops(config: EngineConfig, hardware: Hardware) -> Ops[Any]:
    """The backend of a resolved config."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    if config.backend != "triton":
        return ReferenceOps(dtype)
    # Here, since Triton is not for every platform, and takes a second to import.
    from nybble.kernels.triton_ops import TritonOps

    capability = hardware.capability or _INTERPRETED_AS
    return TritonOps(dtype, arch=max(arch for arch in _TUNED if arch <= capability))


def _is_interpreted() -> bool:
    """Triton's own switch, with which kernels run on a CPU, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
