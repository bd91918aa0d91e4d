from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from poison import poisoned as poisoned

from nybble.kernels.cpu.add_rms_norm import add_rms_norm
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.ops import RmsNorm


def exact(hidden: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
    wide = hidden.double()
    return wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


@pytest.mark.parametrize("has_update", [False, True])
@pytest.mark.parametrize(
    ("tokens", "columns"), [(1, 1), (1, 15), (3, 16), (5, 31), (17, 100), (33, 576), (0, 8)]
)
def test_equals_float64(pool: Pool, tokens: int, columns: int, has_update: bool) -> None:
    generator = torch.Generator().manual_seed(tokens * columns)
    hidden, update = torch.randn(2, tokens, columns, generator=generator) * 3
    norm = RmsNorm(torch.randn(columns, generator=generator), 1e-5)
    added, normed = add_rms_norm(pool, hidden, update if has_update else None, norm)
    expected = hidden + update if has_update else hidden
    assert torch.equal(added, expected)
    assert_close(normed, exact(expected, norm), max_error=2e-6, rms_error=5e-7)


def test_inputs_and_memory_around_outputs_are_left_alone(pool: Pool) -> None:
    around = torch.full((3, 5, 7), 99.0)
    around[1].normal_()
    hidden, update = around[1], torch.randn(5, 7)
    before = around.clone(), update.clone()
    add_rms_norm(pool, hidden, update, RmsNorm(torch.ones(7), 1e-6))
    assert torch.equal(around, before[0])
    assert torch.equal(update, before[1])


def test_zeros_and_large_numbers(pool: Pool) -> None:
    hidden = torch.stack([torch.zeros(64), torch.full((64,), 1e18), torch.full((64,), -1e-18)])
    norm = RmsNorm(torch.ones(64), 1e-6)
    _, normed = add_rms_norm(pool, hidden, None, norm)
    assert_close(normed, exact(hidden, norm), max_error=1e-6, rms_error=1e-6)


def test_what_does_not_fit_is_named(pool: Pool) -> None:
    hidden, norm = torch.zeros(2, 8), RmsNorm(torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match=r"update is .* \[2, 7\]"):
        add_rms_norm(pool, hidden, torch.zeros(2, 7), norm)
    with pytest.raises(ValueError, match=r"norm\.weight is .* \[7\]"):
        add_rms_norm(pool, hidden, None, RmsNorm(torch.ones(7), 1e-6))
    with pytest.raises(ValueError, match=r"hidden is torch\.bfloat16"):
        add_rms_norm(pool, hidden.bfloat16(), None, norm)
