"""The order of columns: a permutation within blocks of 64, with an inverse, in torch and in kernels alike."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_device import DEVICE

from nybble.kernels.triton.activation_order import from_fragment_order, padded_width, to_fragment_order
from nybble.kernels.triton.stored_order import stored_at


@triton.jit
def _places_kernel(places_ptr, WIDTH: tl.constexpr, FRAGMENT_ORDER: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    tl.store(places_ptr + columns, stored_at(columns, FRAGMENT_ORDER))


def test_where_each_column_goes() -> None:
    order = to_fragment_order(torch.arange(192)).tolist()
    for block, thread, pair, j in ((0, 0, 0, 0), (0, 1, 0, 1), (1, 3, 7, 1), (2, 2, 5, 0)):
        assert order[64 * block + 8 * pair + 2 * thread + j] == 64 * block + 16 * thread + 2 * pair + j


def test_inverse() -> None:
    x = torch.randn(3, 2, 256)
    assert torch.equal(from_fragment_order(to_fragment_order(x)), x)
    assert not torch.equal(to_fragment_order(x), x)


def test_products_do_not_change() -> None:
    x, weight = torch.randn(3, 128).double(), torch.randn(5, 128).double()
    permuted = to_fragment_order(x) @ to_fragment_order(weight).T
    torch.testing.assert_close(permuted, x @ weight.T)


@pytest.mark.parametrize(("width", "padded"), [(1, 64), (64, 64), (65, 128), (5120, 5120)])
def test_padded_width(width: int, padded: int) -> None:
    assert padded_width(width) == padded


def test_kernels_agree() -> None:
    places = torch.full((256,), -1, device=DEVICE)
    _places_kernel[(1,)](places, WIDTH=256, FRAGMENT_ORDER=True)
    x = torch.randn(256, device=DEVICE)
    stored = torch.empty_like(x)
    stored[places] = x
    assert torch.equal(stored, to_fragment_order(x))
    _places_kernel[(1,)](places, WIDTH=256, FRAGMENT_ORDER=False)
    assert torch.equal(places, torch.arange(256, device=DEVICE))
