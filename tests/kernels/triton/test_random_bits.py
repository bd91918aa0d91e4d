"""The bits are those of `random_bits`, and their race has the winner of its noise."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from closeness import assert_close
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import DEVICE

from nybble.kernels.random_bits import draw_bits, gumbel
from nybble.kernels.triton.random_bits import exponential, token_bits

MASK64 = (1 << 64) - 1


@triton.jit
def _bits_kernel(draws, bits, NUM_TOKENS: tl.constexpr):
    row, ids = tl.program_id(0), tl.arange(0, NUM_TOKENS)
    tl.store(bits + row * NUM_TOKENS + ids, token_bits(tl.load(draws + row), ids).to(tl.int64, bitcast=True))


@triton.jit
def _times_kernel(draws, times, NUM_ROWS: tl.constexpr, NUM_TOKENS: tl.constexpr):
    rows, ids = tl.arange(0, NUM_ROWS)[:, None], tl.arange(0, NUM_TOKENS)[None, :]
    tl.store(times + rows * NUM_TOKENS + ids, exponential(token_bits(tl.load(draws + rows), ids)))


@triton.jit
def _exponential_kernel(bits, times, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(times + at, exponential(tl.load(bits + at).to(tl.uint64, bitcast=True)))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _token_bits(draws: list[int], num_tokens: int) -> Tensor:
    bits = torch.empty(len(draws), num_tokens, dtype=torch.int64, device=DEVICE)
    _bits_kernel[(len(draws),)](torch.tensor(draws, device=DEVICE), bits, NUM_TOKENS=num_tokens)
    return bits


def _exponential(bits: list[int]) -> Tensor:
    times = torch.empty(len(bits), device=DEVICE)
    _exponential_kernel[(1,)](torch.tensor(bits, device=DEVICE), times, COUNT=len(bits))
    return times


def _hashed(draw: int, token: int) -> int:
    """SplitMix64 in whole numbers."""
    value = (draw + (token + 1) * 0x9E3779B97F4A7C15) & MASK64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK64
    return _signed(value ^ value >> 31)


@pytest.mark.parametrize("draw", [0, 1, -1, 2**63 - 1, -(2**63), draw_bits(7, 3), draw_bits(8, 151_551)])
def test_bits_of_tokens(draw: int) -> None:
    assert _token_bits([draw], 512)[0].tolist() == [_hashed(draw, token) for token in range(512)]


def test_each_row_has_its_own_bits() -> None:
    bits = _token_bits([draw_bits(0, position) for position in range(6)], 64)
    assert len(set(bits.flatten().tolist())) == 6 * 64


def test_exponential_of_all_kinds_of_bits() -> None:
    """Those next to 0, to 1 and to 1/2, where the nearer end changes, and random ones of all magnitudes."""
    random = [draw_bits(1, position) for position in range(1024)]
    small = [(value & MASK64) >> (position % 64) for position, value in enumerate(random)]
    bits = [*random, *small, *(~value & MASK64 for value in small)]
    edges = [0, 1 << 12, (1 << 63) - 1, 1 << 63, (1 << 63) - (1 << 12), MASK64, MASK64 - (1 << 12), 1 << 44]
    bits = [*bits, *edges]
    bits = [_signed(value & MASK64) for value in bits + [0] * (4096 - len(bits))]
    times = _exponential(bits).double().cpu()
    uniform = torch.tensor([(value & MASK64) >> 12 for value in bits]).double()
    exact = -torch.special.log1p(-((2.0**52 - uniform) - 0.5) * 2.0**-52)  # 1 - u is exact
    assert ((times / exact - 1).abs() < 4e-7).all()


def test_the_race_is_that_of_the_noise() -> None:
    draws = torch.tensor([draw_bits(3, position) for position in range(4)], device=DEVICE)
    bits = _token_bits(draws.tolist(), 1024)
    noise = torch.stack([-_exponential(row.tolist()).log() for row in bits])
    assert_close(noise, gumbel(draws, 1024), max_error=1e-6, rms_error=2e-7)


def test_winners_of_the_race_pass_a_chi_square_test() -> None:
    rates, count = torch.tensor([0.4, 0.1, 0.3, 0.2], device=DEVICE), 8192
    draws = torch.tensor([draw_bits(4, position) for position in range(count)], device=DEVICE)
    times = torch.empty(count, 4, device=DEVICE)
    _times_kernel[(1,)](draws, times, NUM_ROWS=count, NUM_TOKENS=4)
    found = (times / rates).argmin(dim=1).bincount(minlength=4)
    expected = rates * count
    assert (found - expected).square().div(expected).sum() <= 3 + 4 * math.sqrt(6) + 8  # p < 1e-4
