from __future__ import annotations

import pytest
import torch

from nybble.kernels.cpu.index_range import index_range


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_of_any_shape(dtype: torch.dtype) -> None:
    assert index_range(torch.tensor([[5, -3], [9, 0]], dtype=dtype)) == (-3, 9)
    assert index_range(torch.tensor([7], dtype=dtype)) == (7, 7)


def test_nothing_lies_outside_of_any_range() -> None:
    assert index_range(torch.empty(0, dtype=torch.int64)) == (0, -1)
    assert index_range(torch.empty(2, 0, dtype=torch.int32)) == (0, -1)
