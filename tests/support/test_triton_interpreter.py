"""Arithmetic, dots and reductions of the repaired interpreter, against torch and float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from closeness import assert_close
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton_device import interpreted_only
from triton_interpreter import repair

pytestmark = interpreted_only

BF16, INF, NAN = torch.bfloat16, torch.inf, torch.nan
SPECIAL = [0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 3.0, 1e-40, -9e-41, 3.38e38, 1.18e-38, 0.333]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pairs() -> tuple[Tensor, Tensor]:
    """All pairs of 128 bfloat16: the special ones, subnormals and random patterns."""
    patterns = torch.randint(-(2**15), 2**15, (128 - len(SPECIAL),), dtype=torch.int16)
    numbers = torch.cat([torch.tensor(SPECIAL).bfloat16(), patterns.view(BF16)])
    return numbers.repeat_interleave(128), numbers.repeat(128)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _pairs_kernel(x_ptr, y_ptr, numbers, truths, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(numbers + 0 * N + i, x + y)
    tl.store(numbers + 1 * N + i, x - y)
    tl.store(numbers + 2 * N + i, x * y)
    tl.store(numbers + 3 * N + i, x / y)
    tl.store(numbers + 4 * N + i, tl.minimum(x, y))
    tl.store(numbers + 5 * N + i, tl.maximum(x, y))
    tl.store(numbers + 6 * N + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(numbers + 7 * N + i, tl.where(x < y, x, y))
    tl.store(numbers + 8 * N + i, tl.clamp(x, -2.0, 3.0))
    tl.store(numbers + 9 * N + i, -x)
    tl.store(numbers + 10 * N + i, tl.abs(x))
    tl.store(numbers + 11 * N + i, 0.1 * x + tl.full((N,), 0.3, tl.bfloat16))
    tl.store(truths + 0 * N + i, x < y)
    tl.store(truths + 1 * N + i, x >= y)
    tl.store(truths + 2 * N + i, x == y)
    tl.store(truths + 3 * N + i, (x != y) & (x > 0))


def test_bfloat16_arithmetic_on_all_pairs() -> None:
    x, y = pairs()
    numbers, truths = torch.full((12, len(x)), NAN, dtype=BF16), torch.zeros(4, len(x), dtype=torch.bool)
    _pairs_kernel[(1,)](x, y, numbers, truths, len(x))
    limited = x.fmax(torch.tensor(-2.0).bfloat16()).fmin(torch.tensor(3.0).bfloat16())
    scaled = torch.tensor(0.1).bfloat16() * x + torch.tensor(0.3).bfloat16()
    expected = [x + y, x - y, x * y, x / y, x.fmin(y), x.fmax(y), x.maximum(y), torch.where(x < y, x, y)]
    expected += [limited, -x, x.abs(), scaled]
    assert_equal(numbers, torch.stack(expected))
    assert_equal(truths, torch.stack([x < y, x >= y, x == y, (x != y) & (x > 0)]))


@triton.jit
def _fma_kernel(x, y, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 24), (torch.float16, 11), (BF16, 8)])
def test_fma_rounds_once(dtype: torch.dtype, digits: int) -> None:
    """The product is halfway between two numbers, and the addend decides, however small."""
    x = torch.tensor([1.5, 1.5, 1.5, 3.0]).to(dtype)
    y = torch.tensor([1 + 2.0 ** (1 - digits)] * 3 + [5.0]).to(dtype)
    z = torch.tensor([1e-7, -1e-7, 0.0, 7.0]).to(dtype)
    out = torch.empty_like(x)
    _fma_kernel[(1,)](x, y, z, out, 4)
    low, high = 1.5 + 2.0 ** (1 - digits), 1.5 + 2 * 2.0 ** (1 - digits)
    assert out.tolist() == [high, low, high, 22.0]


def test_fma_keeps_the_last_bit_of_a_small_product() -> None:
    """The sum is 2 ** -54 below halfway: float64 has it on halfway, from where it would round up."""
    x, y, z = (torch.tensor([number]) for number in (1 + 2.0**-15, 2.0**-24 * (1 - 2.0**-15), 1 + 2.0**-23))
    out = torch.empty(1)
    _fma_kernel[(1,)](x, y, z, out, 1)
    assert out.item() == 1 + 2.0**-23


@triton.jit
def _silent_kernel(x_ptr, out, small, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out + 0 * N + i, tl.exp(x * 1e6))
    tl.store(out + 1 * N + i, x - x)
    tl.store(out + 2 * N + i, tl.log(x))
    tl.store(out + 3 * N + i, 1 / x)
    tl.store(out + 4 * N + i, tl.rsqrt(x))
    tl.store(out + 5 * N + i, tl.max(x - x, 0) + tl.argmax(x - x, 0) + tl.sum(x, 0))
    tl.store(out + 6 * N + i, tl.sum(tl.cumsum(x, 0) * 3e38, 0))
    tl.store(small + i, x * 1e6)


def test_no_warnings_where_a_gpu_is_silent() -> None:
    x = torch.tensor([INF, -INF, 0.0, 1.0])
    out, small = torch.full((7, 4), 7.0), torch.zeros(4, dtype=torch.float16)
    _silent_kernel[(1,)](x, out, small, 4)
    assert_equal(out[0], torch.tensor([INF, 0, 1, INF]))
    assert_equal(out[1], torch.tensor([NAN, NAN, 0, 0]))
    assert_equal(out[2], torch.tensor([INF, NAN, -INF, 0]))
    assert_equal(out[3], torch.tensor([0, -0.0, INF, 1]))
    assert_equal(out[4], torch.tensor([0, NAN, INF, 1]))
    assert small.tolist() == [INF, -INF, 0, INF]


@triton.jit
def _float8_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + tl.load(x + i))


def test_arithmetic_of_float8_is_refused() -> None:
    x = torch.ones(16).to(E4M3)
    with pytest.raises(InterpreterError, match="no GPU computes in float8"):
        _float8_kernel[(1,)](x, x.clone(), 16)


@triton.jit
def _dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.load(c + m[:, None] * N + n[None, :])
    acc = tl.dot(tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :]), acc)
    tl.store(c + m[:, None] * N + n[None, :], acc)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (E4M3, E4M3), (E5M2, E4M3), (torch.float16, torch.float16)])
def test_dots(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    a, b = (torch.randn(shape).to(dtype) for shape, dtype in zip([(16, 64), (64, 32)], dtypes, strict=True))
    c = torch.randn(16, 32)
    expected = c.double() + a.double() @ b.double()
    _dot_kernel[(1,)](a, b, c, 16, 32, 64)
    assert_close(c, expected, max_error=1e-6, rms_error=3e-7)


@triton.jit
def _reduce_kernel(x_ptr, sums, total, kept, extremes, places, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(sums + m, tl.sum(x, 1))
    tl.store(total, tl.sum(x))
    tl.store(kept + m[:, None], tl.sum(x, 1, keep_dims=True))
    largest, at = tl.max(x, 1, return_indices=True)
    tl.store(extremes + m, largest)
    tl.store(extremes + M + m, tl.max(x, 1))
    tl.store(extremes + 2 * M + m, tl.min(x, 1))
    tl.store(places + m, at)
    tl.store(places + M + m, tl.argmin(x, 1))


def reduced(x: Tensor) -> tuple[Tensor, ...]:
    m, n = x.shape
    sums, total, kept = (torch.full(shape, NAN, dtype=x.dtype) for shape in ((m,), (), (m, 1)))
    extremes, places = torch.full((3, m), NAN), torch.full((2, m), -1, dtype=torch.int32)
    _reduce_kernel[(1,)](x, sums, total, kept, extremes, places, m, n)
    return sums, total, kept, extremes, places


def test_reductions_of_bfloat16() -> None:
    x = torch.randn(8, 64).bfloat16()
    sums, total, kept, extremes, places = reduced(x)
    exact = x.double()
    assert_close(sums, exact.sum(1), max_error=0.02, rms_error=0.01)
    assert_close(total, exact.sum(), max_error=0.02, rms_error=0.01)
    assert_equal(kept, sums[:, None])
    assert_equal(extremes, torch.stack([x.amax(1), x.amax(1), x.amin(1)]).float())
    assert_equal(places, torch.stack([x.argmax(1), x.argmin(1)]).int())


def test_sums_of_bfloat16_round_at_every_step() -> None:
    """Halves meet halves: 256 + 1 stays 256, twice, but the sums of ones grow together."""
    x = torch.ones(2, 1024, dtype=BF16)
    x[1] = 0
    x[1, 0], x[1, 256], x[1, 512] = 256, 1, 1
    assert reduced(x)[0].tolist() == [1024, 256]


def test_numbers_win_over_nan_in_reductions() -> None:
    for dtype in (torch.float32, BF16):
        _, _, _, extremes, places = reduced(torch.tensor([[NAN, 1, 2, NAN], [NAN, NAN, NAN, NAN]]).to(dtype))
        assert_equal(extremes, torch.tensor([[2.0, NAN], [2.0, NAN], [1.0, NAN]]))
        assert places[:, 0].tolist() == [2, 1]


# Before 3.9 cumsum and cumprod go to float32 themselves; 3.9 takes cumprod for the scan named here.
@triton.jit
def _scan_kernel(x_ptr, sums, backward, products, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(sums + at, tl.cumsum(x, 1))
    tl.store(backward + at, tl.cumsum(x, 0, reverse=True))
    tl.store(products + at, tl.associative_scan(x, 1, tl.standard._prod_combine))


def scanned(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums, backward, products = (torch.full_like(x, NAN) for _ in range(3))
    _scan_kernel[(1,)](x, sums, backward, products, *x.shape)
    return sums, backward, products


def test_scans_of_bfloat16() -> None:
    x = torch.exp2(torch.randint(-1, 2, (16, 64)).float()).bfloat16()  # their sums and products are exact
    sums, backward, products = scanned(x)
    assert_equal(sums, x.cumsum(1))
    assert_equal(backward, x.flip(0).cumsum(0).flip(0))
    assert_equal(products, x.cumprod(1))


def test_scans_of_bfloat16_round_at_every_step() -> None:
    """They meet in a tree: no 1 vanishes beside 256, but 1.0625 squared rounds down before the next step."""
    sums, _, products = scanned(torch.tensor([[1.0] * 512, [1 + 2.0**-7] * 512]).bfloat16())
    assert sums[0, [127, 255, 256, 511]].tolist() == [128, 256, 256, 512]
    assert products[1, [1, 3, 7, 15]].tolist() == [1.015625, 1.03125, 1.0625, 1.125]


@triton.jit
def _device_kernel(x, rounded, curved, steps, N: tl.constexpr):
    gdc_wait()
    i = tl.arange(0, N)
    tl.store(rounded + i, libdevice.rint(tl.load(x + i)))
    tl.store(curved + i, libdevice.tanh(tl.load(x + i)))
    total = 0
    for step in tl.range(tl.load(steps)):
        total += step
    tl.store(steps, total)
    gdc_launch_dependents()


def test_libdevice_and_dependent_launches_and_loops_to_a_loaded_end() -> None:
    x, rounded, curved, steps = torch.randn(16) * 3, torch.empty(16), torch.empty(16), torch.tensor([5])
    _device_kernel[(1,)](x, rounded, curved, steps, 16)
    assert_equal(rounded, x.round())
    assert_close(curved, x.tanh(), max_error=1e-6, rms_error=1e-6)
    assert steps.item() == 10


def test_a_second_repair_changes_nothing() -> None:
    before = dict(vars(interpreter)), type(interpreter.interpreter_builder)
    repair()
    assert (dict(vars(interpreter)), type(interpreter.interpreter_builder)) == before
