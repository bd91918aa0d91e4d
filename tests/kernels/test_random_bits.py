from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nybble.kernels.random_bits import _mix, draw_bits, draw_bits_of, gumbel

STEP, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
EULER_GAMMA = 0.5772156649015329


def test_mixing_is_splitmix64() -> None:
    """The generator's published first outputs for the seed 1234567."""
    outputs = [_mix(1234567 + n * STEP & MASK) for n in range(1, 6)]
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_draws_of_seed_0_are_the_published_sequence() -> None:
    outputs = [16294208416658607535, 7960286522194355700, 487617019471545679]
    assert [draw_bits(0, position) & MASK for position in range(3)] == outputs


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_draws_are_int64_and_repeat(seed: int, position: int) -> None:
    draw = draw_bits(seed, position)
    assert -(2**63) <= draw < 2**63
    assert draw == draw_bits(seed, position)
    assert torch.tensor(draw).item() == draw


def _square(side: int, first_seed: int = 0) -> Tensor:
    """Draws as float64 in [0, 1): [seeds, positions]."""
    seeds = range(first_seed, first_seed + side)
    rows = [[(draw_bits(seed, position) & MASK) / 2**64 for position in range(side)] for seed in seeds]
    return torch.tensor(rows, dtype=torch.float64)


def _assert_even(values: Tensor, bins: int = 100) -> None:
    """Chi-square, both tails: too even is not random either."""
    expected = values.numel() / bins
    counts = torch.histc(values.flatten(), bins=bins, min=0, max=1)
    statistic = ((counts - expected).square() / expected).sum().item()
    assert abs(statistic - (bins - 1)) < 4 * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("first_seed", [0, 2**62, -100])
def test_draws_fill_all_bins_evenly(first_seed: int) -> None:
    values = _square(200, first_seed)
    _assert_even(values)
    _assert_even(values * 2**20 % 1)  # lower bits
    assert len(values.unique()) == values.numel()


def _correlation(left: Tensor, right: Tensor) -> float:
    """In units of the standard deviation that independent numbers would give."""
    both = torch.stack((left.flatten(), right.flatten()))
    return torch.corrcoef(both)[0, 1].item() * math.sqrt(left.numel())


@pytest.mark.parametrize(("seeds", "positions"), [(1, 0), (0, 1), (1, 1), (0, 16)])
def test_neighbours_are_not_correlated(seeds: int, positions: int) -> None:
    values = _square(200)
    here, there = values[: 200 - seeds, : 200 - positions], values[seeds:, positions:]
    assert abs(_correlation(here, there)) < 4


def test_many_draws_are_those_one_by_one() -> None:
    pairs = [(0, 0), (1, 0), (2**63 - 1, 5), (2**64 - 1, 202_751), (12345, 2**40)]
    seeds = np.array([seed for seed, _ in pairs], dtype=np.uint64)
    draws = draw_bits_of(seeds, np.array([position for _, position in pairs], dtype=np.int64))
    assert draws.dtype == np.int64
    assert draws.tolist() == [draw_bits(*pair) for pair in pairs]


def test_seed_and_position_are_not_interchangeable() -> None:
    values = _square(50)
    assert (values != values.T).sum() == 50 * 49


def _gumbel(draw: int, token: int) -> float:
    """In Python's unbounded integers."""
    bits = _mix((draw + (token + 1) * STEP) & MASK) >> 12
    return -math.log(-math.log((bits + 0.5) * 2.0**-52))


def test_gumbel_is_the_documented_function() -> None:
    draws = [0, 1, -1, 2**63 - 1, -(2**63), draw_bits(3, 4)]
    expected = [[_gumbel(draw, token) for token in range(300)] for draw in draws]
    noise = gumbel(torch.tensor(draws), 300)
    assert noise.dtype == torch.float64
    assert_close(noise, torch.tensor(expected, dtype=torch.float64), max_error=1e-12, rms_error=1e-12)


def test_noise_is_finite_at_the_ends_of_the_uniform() -> None:
    """This draw's third token has the largest hash there is."""
    assert gumbel(torch.tensor([-796126118128371327]), 5).isfinite().all()


def test_a_tokens_noise_does_not_depend_on_the_size_of_the_vocabulary() -> None:
    draws = torch.tensor([5, -7])
    assert torch.equal(gumbel(draws, 100), gumbel(draws, 1000)[:, :100])


def _noise() -> Tensor:
    return gumbel(torch.tensor([draw_bits(1, position) for position in range(300)]), 300)


def test_gumbel_has_the_distribution_of_its_name() -> None:
    noise = _noise()
    _assert_even((-(-noise).exp()).exp())  # its cumulative distribution function
    count = noise.numel()
    assert abs(noise.mean().item() - EULER_GAMMA) < 4 * math.pi / math.sqrt(6 * count)
    assert abs(noise.var().item() / (math.pi**2 / 6) - 1) < 4 * math.sqrt(4.4 / count)  # kurtosis 5.4


def test_noise_of_neighbouring_rows_and_tokens_is_not_correlated() -> None:
    noise = _noise()
    assert abs(_correlation(noise[1:], noise[:-1])) < 4
    assert abs(_correlation(noise[:, 1:], noise[:, :-1])) < 4
    assert abs(_correlation(noise[1:, :-1], noise[:-1, 1:])) < 4
    assert len(noise.unique()) == noise.numel()
