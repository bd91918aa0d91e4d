"""Casts of the repaired interpreter: all patterns of the small types, dense samples of the large ones."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_device import interpreted_only

pytestmark = interpreted_only

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
INF, NAN = torch.inf, torch.nan


def all_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(256**dtype.itemsize).to(PATTERNS[dtype.itemsize]).view(dtype)


def float32_sample() -> Tensor:
    """Every upper half with the lower halves at which 16-bit and 8-bit types turn: 2 ** 19 numbers."""
    upper = torch.arange(2**16)[:, None] << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001])
    return (upper | lower).flatten().to(torch.int32).view(torch.float32)


def float64_sample() -> Tensor:
    """On and beside points halfway between the numbers of every other type, at the exponents of all."""
    offsets = torch.tensor([0, *(n * 2.0**-bits for bits in (2, 3, 4, 7, 8, 10, 11, 23, 24) for n in (1, 3))])
    beside = torch.tensor([0, 2.0**-30, -(2.0**-30), 2.0**-50, -(2.0**-50)]).double()
    significands = 1 + (offsets.double()[:, None] + beside).flatten()
    numbers = (torch.exp2(torch.arange(-160, 140).double())[:, None] * significands).flatten()
    positive = torch.cat([numbers, torch.tensor([0, INF, NAN, 1e300, 5e-324]).double()])
    return torch.cat([positive, -positive])


def sample(dtype: torch.dtype) -> Tensor:
    if dtype.itemsize < 4:
        return all_patterns(dtype)
    return float32_sample() if dtype == torch.float32 else float64_sample()


def nearest(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's cast, saturating for float8. But from float64 to a small type torch rounds twice."""
    if dtype.itemsize < 4 and numbers.dtype == torch.float64:
        return nearest_in_table(numbers, dtype)
    limit = torch.finfo(dtype).max if dtype.itemsize == 1 else INF
    return numbers.double().clamp(-limit, limit).to(dtype)


def magnitudes(dtype: torch.dtype) -> Tensor:
    """Its finite numbers from 0, ascending: number n has the pattern n."""
    numbers = all_patterns(dtype)[: 128 * 256 ** (dtype.itemsize - 1)].double()
    return numbers[numbers.isfinite()]


def nearest_in_table(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Infinity counts as what its pattern would be worth, but float8 saturates."""
    table = magnitudes(dtype)
    if dtype.itemsize == 2:
        table = torch.cat([table, 2 * table[-1:] - table[-2:-1]])
    magnitude = numbers.abs().nan_to_num(nan=0).clamp(max=table[-1].item())
    above = torch.searchsorted(table, magnitude)
    below = (above - 1).clamp(min=0)
    excess = (magnitude - table[below]) - (table[above] - magnitude)
    chosen = above.where((excess > 0) | ((excess == 0) & (above % 2 == 0)), below)
    return table[chosen].copysign(numbers).where(~numbers.isnan(), NAN).to(dtype)


def assert_same(actual: Tensor, expected: Tensor, numbers: Tensor) -> None:
    """The same bits, the sign of zeros too; but any NaN will do for NaN."""
    assert actual.dtype == expected.dtype
    integers = PATTERNS[actual.itemsize]
    is_wrong = actual.view(integers) != expected.view(integers)
    if actual.is_floating_point():
        is_wrong &= ~(actual.double().isnan() & expected.double().isnan())
    assert not is_wrong.any(), f"{int(is_wrong.sum())}: {numbers[is_wrong][:5]} became {actual[is_wrong][:5]}"


@triton.jit
def _cast_kernel(source, target, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i).to(target.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def cast(numbers: Tensor, dtype: torch.dtype, rounding: str | None = None) -> Tensor:
    block = triton.next_power_of_2(len(numbers))
    source = (
        torch.cat([numbers, numbers.new_zeros(block - len(numbers))]) if block > len(numbers) else numbers
    )
    target = torch.empty(block, dtype=dtype)
    _cast_kernel[(1,)](source, target, rounding, block)
    return target[: len(numbers)]


@pytest.mark.parametrize(("source", "target"), list(permutations(FLOATS, 2)))
def test_floats_round_once_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    numbers = sample(source)
    assert_same(cast(numbers, target), nearest(numbers, target), numbers)


def test_the_table_agrees_with_torch_where_torch_rounds_once() -> None:
    numbers = float32_sample()[::5]
    for dtype in FLOATS[2:]:
        assert_same(nearest_in_table(numbers.double(), dtype), nearest(numbers, dtype), numbers)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_saturates_from_every_type(dtype: torch.dtype) -> None:
    for source in (torch.float32, torch.float16, torch.bfloat16):
        large = torch.tensor([60000, -60000, INF, -INF], dtype=source)
        limit = torch.finfo(dtype).max
        assert cast(large, dtype).float().tolist() == [limit, -limit, limit, -limit]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_rounding_toward_zero(dtype: torch.dtype) -> None:
    """Finite numbers stay finite."""
    numbers, table = float32_sample(), magnitudes(dtype)
    below = torch.searchsorted(table, numbers.double().abs().nan_to_num(nan=0), right=True) - 1
    expected = table[below].copysign(numbers).where(numbers.isfinite(), nearest(numbers, dtype).double())
    assert_same(cast(numbers, dtype, rounding="rtz"), expected.to(dtype), numbers)


@pytest.mark.parametrize(
    "target", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint32, torch.int64]
)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_to_integers(source: torch.dtype, target: torch.dtype) -> None:
    """Towards zero, clamped, NaN to 0; 8-bit integers are the low byte of 16 bits."""
    numbers = sample(source)[::3]
    limits = torch.iinfo({torch.int8: torch.int16, torch.uint8: torch.uint16}.get(target, target))
    clamped = numbers.double().nan_to_num(nan=0).clamp(limits.min, limits.max)
    fits = clamped < 2.0**63
    expected = clamped.where(fits, 0).long().where(fits, limits.max)
    assert_same(cast(numbers, target), expected.to(target), numbers)


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint32])
def test_integers_to_floats(source: torch.dtype, target: torch.dtype) -> None:
    """Once: 2 ** 24 + 2 ** 16 + 1 is above the point halfway between two bfloat16, in float32 it is on it."""
    steps = torch.arange(2**14)
    integers = torch.cat([steps - 2**13, 2**24 + 2**16 * steps + 1, -(2**31) + steps]).to(source)
    expected = (
        integers.double().float() if target == torch.float32 else nearest_in_table(integers.double(), target)
    )
    assert_same(cast(integers, target), expected, integers)
