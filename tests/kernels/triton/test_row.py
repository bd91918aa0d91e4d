"""Chunks cover every row, and few lanes are idle where it matters."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.triton.activation_order import from_fragment_order, to_fragment_order
from nybble.kernels.triton.launch import launch
from nybble.kernels.triton.row import (
    in_fragment_order,
    load_fragment_row,
    load_row,
    row_launch,
    store_row,
)


@pytest.mark.parametrize("arch", ARCHES)
def test_chunks_cover_a_row(arch: int) -> None:
    for width in (*range(16, 3000, 16), 4096, 5120, 7168, 8192, 12288, 16384, 30000):
        launch = row_launch(width, arch)
        assert launch.chunk >= 64 and launch.chunk & launch.chunk - 1 == 0
        assert launch.chunk * (launch.num_chunks - 1) < width <= launch.chunk * launch.num_chunks
        assert launch.num_chunks <= 8
        assert launch.num_warps * 32 * 8 <= max(launch.chunk, 256)


@pytest.mark.parametrize("width", [1536, 5120, 12288])
def test_no_lane_is_idle_at_the_widths_of_glm(width: int) -> None:
    launch = row_launch(width, ARCHES[0])
    assert launch.chunk * launch.num_chunks == width


@triton.jit
def _copy_kernel(
    x_ptr,
    y_ptr,
    width,
    LOADS_FRAGMENTS: tl.constexpr,
    STORES_FRAGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):
    if LOADS_FRAGMENTS:
        parts = load_fragment_row(x_ptr, width, CHUNK, NUM_CHUNKS)
    else:
        parts = load_row(x_ptr, width, CHUNK, NUM_CHUNKS)
    ordered = tl.tuple(())
    for i in tl.static_range(NUM_CHUNKS):
        ordered += (in_fragment_order(parts[i]) if STORES_FRAGMENTS else parts[i],)
    store_row(ordered, y_ptr, width, CHUNK, NUM_CHUNKS)


def _copy(x: Tensor, loads_fragments: bool = False, stores_fragments: bool = False) -> Tensor:
    y, row = torch.empty(len(x) + 64, device=DEVICE), row_launch(len(x), ARCHES[0])
    launch(
        _copy_kernel,
        (1,),
        x,
        y,
        len(x),
        LOADS_FRAGMENTS=loads_fragments,
        STORES_FRAGMENTS=stores_fragments,
        CHUNK=row.chunk,
        NUM_CHUNKS=row.num_chunks,
        num_warps=row.num_warps,
    )
    assert y[len(x) :].isnan().all()
    return y[: len(x)]


@pytest.mark.parametrize("width", [1, 63, 64, 65, 320, 1000])
def test_a_row_is_loaded_and_stored(width: int) -> None:
    x = torch.arange(width, dtype=torch.float32, device=DEVICE)
    assert _copy(x).equal(x)


@pytest.mark.parametrize("width", [64, 320, 1024])
def test_fragment_order(width: int) -> None:
    x = torch.arange(width, dtype=torch.float32, device=DEVICE)
    assert _copy(x, stores_fragments=True).equal(to_fragment_order(x))
    assert _copy(x, loads_fragments=True).equal(from_fragment_order(x))
    assert _copy(x, loads_fragments=True, stores_fragments=True).equal(x)
