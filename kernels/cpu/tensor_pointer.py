"""A tensor's memory for C, once it is known to be what C takes it for."""

from __future__ import annotations

import torch
from torch import Tensor


def pointer(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a tensor's elements, which lie in memory in order.

    Raises:
        ValueError: the tensor is not on the CPU, not contiguous, or not of that dtype and shape.
    """
    if tensor.shape == shape and tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous():
        return tensor.data_ptr()
    layout = "contiguous" if tensor.is_contiguous() else "strided"
    raise ValueError(
        f"{name} is {tensor.dtype} {list(tensor.shape)}, {layout}, on {tensor.device}; "
        f"the native CPU backend takes {dtype} {list(shape)}, contiguous, on the CPU"
    )
