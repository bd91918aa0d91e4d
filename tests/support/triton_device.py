"""Where the tests run kernels: on the GPU if there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

_HAS_GPU = torch.cuda.is_available()


def _arches() -> tuple[int, ...]:
    if not _HAS_GPU:
        return (80, 90, 100, 120)
    major, _ = torch.cuda.get_device_capability()
    return (10 * major,)


DEVICE = torch.device("cuda" if _HAS_GPU else "cpu")
ARCHES = _arches()
"""The architectures whose code paths can run here: a GPU's own, in the interpreter all."""

interpreted_only = pytest.mark.skipif(_HAS_GPU, reason="kernels run on the GPU, they are not interpreted")
