from __future__ import annotations

import pytest
import torch
from poison import poisoned as poisoned

from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.rows import embed, rotary_angles
from nybble.kernels.ops import Embedding, RotaryAngles
from nybble.kernels.reference_ops import ReferenceOps

REFERENCE = ReferenceOps(torch.float32)


@pytest.mark.parametrize("num_ids", [0, 1, 16, 17, 100])
@pytest.mark.parametrize("columns", [1, 33, 576])
def test_rows_are_those_of_their_ids(pool: Pool, num_ids: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(num_ids)
    embedding = Embedding(torch.randn(50, columns, generator=generator), first_id=30)
    ids = torch.randint(0, 120, (num_ids,), generator=generator)
    assert torch.equal(embed(pool, ids, embedding), REFERENCE.embed(ids, embedding))


def test_ids_far_outside_are_zeros(pool: Pool) -> None:
    ids = torch.tensor([-(2**62), -1, 2**62])
    assert not embed(pool, ids, Embedding(torch.ones(4, 8))).any()


def test_angles_are_those_of_their_positions(pool: Pool) -> None:
    cos, sin = torch.randn(2, 40, 6)
    table, positions = RotaryAngles(cos=cos, sin=sin), torch.tensor([39, 0, 7, 7])
    angles = rotary_angles(pool, table, positions)
    assert torch.equal(angles.cos, cos[positions])
    assert torch.equal(angles.sin, sin[positions])


def test_what_does_not_fit_is_named(pool: Pool) -> None:
    table = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"token_ids is torch\.int32 \[2\]"):
        embed(pool, torch.zeros(2, dtype=torch.int32), Embedding(table))
    with pytest.raises(ValueError, match=r"the table is torch\.bfloat16"):
        embed(pool, torch.zeros(2, dtype=torch.int64), Embedding(table.bfloat16()))
    for position in (4, -1):
        with pytest.raises(ValueError, match=r"positions are .*, but the table has 4 positions"):
            rotary_angles(pool, RotaryAngles(cos=table, sin=table), torch.tensor([2, position]))
