from __future__ import annotations

import pytest
import torch

from nybble.kernels.cpu.kv_cache_layout import from_slot_order, new_kv_cache, num_slots, to_slot_order
from nybble.kernels.ops import KVCacheLayer


def test_the_layout_has_an_inverse_and_says_where_a_slot_is() -> None:
    keys, values = torch.randn(2, 5, 4, 3, 6)  # 5 blocks of 4 slots, 3 heads of 6
    scale = torch.ones(1)
    cache = from_slot_order(KVCacheLayer(keys, values, key_scale=scale))
    assert cache.key_scale is scale
    assert torch.equal(cache.keys[2, 1, :, 3], keys[2, 3, 1])
    assert torch.equal(cache.values[2, 1, 3], values[2, 3, 1])
    back = to_slot_order(cache)
    assert torch.equal(back.keys, keys)
    assert torch.equal(back.values, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_new_cache_has_that_layout(dtype: torch.dtype) -> None:
    cache = new_kv_cache(5, 4, 3, 6, dtype)
    assert cache.keys.dtype == cache.values.dtype == dtype
    assert (cache.keys.shape, cache.values.shape) == ((5, 3, 6, 4), (5, 3, 4, 6))
    assert num_slots(cache) == 20


def test_a_cache_of_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"KV cache of torch\.float16: expected one of"):
        new_kv_cache(5, 4, 3, 6, torch.float16)
