"""The sum over a token's experts against torch, one slot after the other."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from poison import poisoned as poisoned
from rounding import assert_rounds_alike
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.triton.combine import combine_experts, combine_launch


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def _combined(
    partials: Tensor,
    weights: Tensor | None = None,
    extra: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    arch: int = ARCHES[0],
) -> Tensor:
    launch = combine_launch(partials.shape[0], partials.shape[2], arch)
    return combine_experts(partials, weights, extra, dtype=dtype, launch=launch)


def _reference(partials: Tensor, weights: Tensor | None, extra: Tensor | None) -> Tensor:
    total = torch.zeros(partials.shape[0], partials.shape[2], device=DEVICE)
    for slot in range(partials.shape[1]):
        partial = partials[:, slot].float()
        total = total + (partial if weights is None else partial * weights[:, slot, None])
    return total if extra is None else total + extra.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("has_extra", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 5120), (3, 9, 100), (2, 1, 64), (5, 3, 1)], ids=str)
def test_combine(shape: tuple[int, int, int], has_extra: bool, has_weights: bool, dtype: torch.dtype) -> None:
    partials = _normal(*shape, dtype=dtype)
    weights = _normal(*shape[:2], seed=1) if has_weights else None
    extra = _normal(shape[0], shape[2], seed=2, dtype=dtype) if has_extra else None
    expected = _reference(partials, weights, extra)
    assert_close(_combined(partials, weights, extra), expected, max_error=1e-5, rms_error=1e-6)
    assert_rounds_alike(_combined(partials, weights, extra, torch.bfloat16), expected.bfloat16())


def test_slots_are_added_in_their_order() -> None:
    """In float32 a unit is lost beside 2^25, unless both of those come first and cancel."""
    partials = torch.tensor([[2.0**25, -(2.0**25), 1.0], [2.0**25, 1.0, -(2.0**25)]], device=DEVICE)
    assert _combined(partials[:, :, None]).flatten().tolist() == [1.0, 0.0]
    assert _combined(partials[:, :2, None], None, partials[:, 2:]).flatten().tolist() == [1.0, 0.0]


def test_a_slot_of_weight_zero_may_hold_anything() -> None:
    partials, weights = _normal(2, 4, 70), _normal(2, 4, seed=1)
    weights[0, 1] = weights[1, 3] = weights[1, 0] = 0
    expected = _reference(partials, weights, None)
    partials[0, 1], partials[1, 3], partials[1, 0] = torch.nan, torch.inf, torch.nan
    assert_close(_combined(partials, weights), expected, max_error=1e-5, rms_error=1e-6)


def test_slices() -> None:
    partials, weights, extra = _normal(3, 5, 200), _normal(3, 9, seed=1), _normal(3, 150, seed=2)
    parts = partials[:, 1:4, 30:94], weights[:, 2:5], extra[:, 7:71]
    assert_close(_combined(*parts), _reference(*parts), max_error=1e-5, rms_error=1e-6)


@pytest.mark.parametrize("arch", ARCHES)
def test_two_runs_are_equal(arch: int) -> None:
    partials, weights = _normal(4, 8, 300, dtype=torch.bfloat16), _normal(4, 8, seed=1)
    assert _combined(partials, weights, arch=arch).equal(_combined(partials, weights, arch=arch))


def test_no_tokens() -> None:
    assert _combined(_normal(0, 8, 64)).shape == (0, 64)
