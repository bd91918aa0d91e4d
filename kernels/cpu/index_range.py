"""Which indices a tensor holds, for checks of those that C follows."""

from __future__ import annotations

from torch import Tensor


def index_range(indices: Tensor) -> tuple[int, int]:
    """The lowest and the highest; 0 and -1 if there is none."""
    if not indices.numel():
        return 0, -1
    values = indices.numpy()
    return int(values.min()), int(values.max())
