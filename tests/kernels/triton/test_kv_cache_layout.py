"""Where each number lies in the head-major cache, and the way back."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels.ops import KVCacheLayer
from nybble.kernels.triton.kv_cache_layout import from_head_major, new_head_major, to_head_major

BLOCKS, BLOCK_SIZE, HEADS, DIM = 3, 16, 2, 4


def _reference(dtype: torch.dtype) -> KVCacheLayer:
    numbers = torch.randn(2, BLOCKS, BLOCK_SIZE, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    return KVCacheLayer(numbers[0].to(dtype), numbers[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_there_and_back(dtype: torch.dtype) -> None:
    cache = _reference(dtype)
    back = from_head_major(to_head_major(cache))
    for ours, theirs in ((back.keys, cache.keys), (back.values, cache.values)):
        assert ours.is_contiguous()
        assert ours.view(torch.uint8).equal(theirs.view(torch.uint8))


def test_a_head_of_a_block_is_one_run_with_values_transposed() -> None:
    cache = _reference(torch.float32)
    ours = to_head_major(cache)
    assert ours.keys.is_contiguous() and ours.values.is_contiguous()
    for block, slot, head, dim in ((0, 0, 0, 0), (2, 5, 1, 3), (1, 15, 0, 2)):
        assert ours.keys[block, head, slot, dim] == cache.keys[block, slot, head, dim]
        assert ours.values[block, head, dim, slot] == cache.values[block, slot, head, dim]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_new_cache_is_finite_everywhere(dtype: torch.dtype) -> None:
    cache = new_head_major(BLOCKS, HEADS, BLOCK_SIZE, DIM, dtype, torch.device("cpu"))
    converted = to_head_major(_reference(dtype))
    for ours, theirs in ((cache.keys, converted.keys), (cache.values, converted.values)):
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        assert not ours.float().any()
