from __future__ import annotations

import pytest
import torch

from nybble.kernels.cpu.tensor_pointer import pointer


def test_address_of_the_first_element() -> None:
    tensor = torch.zeros(4, 3)
    assert pointer("x", tensor, torch.float32, (4, 3)) == tensor.data_ptr()
    assert pointer("x", tensor[1:], torch.float32, (3, 3)) == tensor.data_ptr() + 12


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 2),
        torch.zeros(4, 3, 1),
        torch.zeros(4, 3, dtype=torch.float64),
        torch.zeros(3, 4).T,
        torch.zeros(8, 3)[::2],
        torch.zeros(4, 3, device="meta"),
    ],
)
def test_anything_else_is_named(tensor: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"x is torch.* takes torch.float32 \[4, 3\], contiguous, on the CPU"
    ):
        pointer("x", tensor, torch.float32, (4, 3))
