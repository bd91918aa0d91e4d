"""Other libraries in the benchmark: each is optional, and what is missing is a reason and no error.

They are imported by name when a case asks for them, since kernels need nothing but torch and Triton. Only
interfaces that were read in the library's source or documentation are used; whatever another version does
otherwise comes out as an error of the peer or as a wrong result, and then it has no row.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from nybble.kernels.bench.workload import PeerMissingError


def library(name: str) -> Any:
    """The module. Raises PeerMissingError."""
    try:
        return import_module(name)
    except ImportError as error:
        raise PeerMissingError(f"{name.partition('.')[0]} cannot be imported: {error}") from error


def require(condition: bool, reason: str) -> None:
    """Raises PeerMissingError with `reason` unless `condition` holds."""
    if not condition:
        raise PeerMissingError(reason)


def require_room(num_bytes: int, what: str, device: torch.device) -> None:
    """Raises PeerMissingError unless a GPU has that much memory left, and some more."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        require(num_bytes < 0.8 * free, f"{what}, {num_bytes / 1e9:.0f} GB, does not fit")
