"""Rotary angles against float64 to the last position, and against transformers where it is exact itself."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

from nybble.engine.model.rotary import rotary_table
from nybble.kernels.ops import RotaryAngles
from nybble.kernels.reference_ops import ReferenceOps

THETA, ROTARY_DIM, NUM_POSITIONS = 1e6, 64, 202_752  # GLM-4.7
LAST = NUM_POSITIONS - 1


@pytest.fixture(scope="module")
def table() -> RotaryAngles:
    return rotary_table(THETA, ROTARY_DIM, NUM_POSITIONS, torch.device("cpu"))


def _at(table: RotaryAngles, positions: list[int], dtype: torch.dtype = torch.float32) -> RotaryAngles:
    return ReferenceOps(dtype).rotary_angles(table, torch.tensor(positions))


def _exact(positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, by Python's own numbers."""
    angles = [[p * THETA ** (-2 * i / ROTARY_DIM) for i in range(ROTARY_DIM // 2)] for p in positions]
    cos, sin = ([[turn(angle) for angle in row] for row in angles] for turn in (math.cos, math.sin))
    return torch.tensor(cos, dtype=torch.float64), torch.tensor(sin, dtype=torch.float64)


def _theirs(positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """float32, as transformers computes them."""
    parameters = {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}
    config = Glm4MoeConfig(head_dim=128, max_position_embeddings=NUM_POSITIONS, rope_parameters=parameters)
    cos, sin = Glm4MoeRotaryEmbedding(config)(torch.zeros(1), torch.tensor([positions]))
    return cos[0, :, : ROTARY_DIM // 2], sin[0, :, : ROTARY_DIM // 2]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2.0**-25), (torch.bfloat16, 2.0**-9)])
def test_exact_to_the_last_position(table: RotaryAngles, dtype: torch.dtype, rounding: float) -> None:
    """Half a unit in the last place of numbers below 1, and what float64 itself loses."""
    positions = [*range(0, NUM_POSITIONS, 997), 131_071, 131_072, LAST - 1, LAST]
    angles, exact = _at(table, positions, dtype), _exact(positions)
    for found, expected in zip((angles.cos, angles.sin), exact, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= rounding * 1.001


def test_equal_to_transformers_at_short_positions(table: RotaryAngles) -> None:
    positions = list(range(513))
    angles, theirs = _at(table, positions), _theirs(positions)
    for found, expected in zip((angles.cos, angles.sin), theirs, strict=True):
        assert (found - expected).abs().max() < 2e-5
        assert (found.bfloat16() == expected.bfloat16()).float().mean() > 0.998


def test_transformers_is_not_exact_at_the_last_position(table: RotaryAngles) -> None:
    """The figure by which `rotary.py` differs: should it vanish, so should the difference."""
    (cos, sin), (exact_cos, exact_sin) = _theirs([LAST]), _exact([LAST])
    error = max(float((cos - exact_cos).abs().max()), float((sin - exact_sin).abs().max()))
    assert 0.004 < error < 0.008


def test_neighbours_are_one_step_apart_anywhere(table: RotaryAngles) -> None:
    """Turning from position p to p + 1 is turning from 0 to 1, at the end of the context too."""
    for position in (0, 1000, LAST - 1):
        angles = _at(table, [position, position + 1, 1])
        turns = torch.complex(angles.cos.double(), angles.sin.double())
        assert (turns[1] / turns[0] - turns[2]).abs().max() < 2e-7
