"""Keys keep the order of numbers, and packed keys give both number and id back."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from poison import poisoned as poisoned
from triton_device import DEVICE

from nybble.kernels.triton.sort_keys import (
    LOWEST,
    MINUS_INFINITY_KEY,
    key_numbers,
    packed,
    packed_ids,
    packed_numbers,
    sort_keys,
)

INF = torch.inf
RISING = [-INF, -3.4028234663852886e38, -2.5, -1.0, -1e-40, 0.0, 1e-45, 1e-38, 1.0, 1.0000001, 3e38, INF]


@triton.jit
def _keys_kernel(numbers, ids, keys, items, numbers_back, unpacked, ids_back, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    x, token = tl.load(numbers + at), tl.load(ids + at)
    key = sort_keys(x)
    item = packed(key, token)
    tl.store(keys + at, key)
    tl.store(items + at, item)
    tl.store(numbers_back + at, key_numbers(key))
    tl.store(unpacked + at, packed_numbers(item))
    tl.store(ids_back + at, packed_ids(item))


def _keys(numbers: list[float], ids: list[int]) -> tuple[list[int], list[int], list[float], list[int]]:
    """Keys, packed keys, and what comes back: numbers and ids."""
    x = torch.tensor(numbers, device=DEVICE)
    tokens = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
    keys, items = torch.empty_like(tokens), torch.empty_like(tokens, dtype=torch.int64)
    back, unpacked, ids_back = torch.empty_like(x), torch.empty_like(x), torch.empty_like(tokens)
    _keys_kernel[(1,)](x, tokens, keys, items, back, unpacked, ids_back, COUNT=len(numbers))
    torch.testing.assert_close(back, unpacked, rtol=0, atol=0, equal_nan=True)
    return keys.tolist(), items.tolist(), back.tolist(), ids_back.tolist()


def test_keys_rise_with_the_numbers_and_give_them_back() -> None:
    keys, _, back, _ = _keys([*RISING, -0.0, 5.0, 6.0, 7.0], [0] * 16)
    assert all(below < above for below, above in itertools.pairwise(keys[: len(RISING)]))
    assert back[: len(RISING)] == torch.tensor(RISING).tolist()
    assert keys[0] == MINUS_INFINITY_KEY.value


def test_minus_zero_is_zero_and_nan_the_largest() -> None:
    keys, _, back, _ = _keys([0.0, -0.0, INF, torch.nan, -torch.nan, 1.0, 1.0, 1.0], [0] * 8)
    assert keys[0] == keys[1] == 0
    assert keys[3] == keys[4] > keys[2]
    assert back[3] != back[3]


def test_packed_keys_order_by_number_then_by_the_lowest_id() -> None:
    numbers = [1.0, -2.0, 1.0, -2.0, 0.0, 0.0, -INF, -INF]
    ids = [3, 0, 2, 2**31 - 1, 9, 1, 0, 2**31 - 1]
    _, items, _, back = _keys(numbers, ids)
    falling = sorted(range(8), key=lambda at: (-numbers[at], ids[at]))
    assert sorted(range(8), key=lambda at: -items[at]) == falling
    assert back == ids
    assert min(items) > LOWEST.value
