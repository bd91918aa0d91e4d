"""Rows of a table, or of one rank's share of it."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.ops import Embedding
from nybble.kernels.reference_ops import ReferenceOps
from nybble.kernels.triton.embedding import embed, embedding_launch


def _embed(ids: list[int], embedding: Embedding) -> Tensor:
    launch = embedding_launch(embedding.table.shape[1], ARCHES[0])
    return embed(torch.tensor(ids, dtype=torch.int64, device=DEVICE), embedding, launch=launch)


def _table(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 63, 576, 5120])
def test_rows_are_copied(width: int, dtype: torch.dtype) -> None:
    table = _table(7, width, dtype)
    embedded = _embed([6, 0, 6, 3], Embedding(table))
    assert embedded.dtype == dtype
    assert embedded.equal(table[[6, 0, 6, 3]])


@pytest.mark.parametrize("width", [5, 1500])
def test_ids_elsewhere_give_zeros_even_beside_nan(width: int) -> None:
    table = _table(4, width, torch.float32)
    table[0], table[3] = torch.nan, torch.nan
    ids = [8, 9, 6, 11, 0, 151_551, -1, 2**40]
    embedded = _embed(ids, Embedding(table, first_id=7))
    expected = ReferenceOps(torch.float32).embed(torch.tensor(ids, device=DEVICE), Embedding(table, 7))
    assert embedded.equal(expected)
    assert embedded[2:].eq(0).all()


def test_shares_of_the_ranks_add_up() -> None:
    table = _table(12, 65, torch.bfloat16)
    ids = [11, 0, 3, 4, 7, 8, 3]
    shares = [_embed(ids, Embedding(table[first : first + 4], first)) for first in (0, 4, 8)]
    assert (shares[0] + shares[1] + shares[2]).equal(table[ids])


def test_rows_of_the_table_at_any_distance() -> None:
    table = _table(6, 200, torch.float32)
    assert _embed([5, 1], Embedding(table[:, 50:114])).equal(table[[5, 1], 50:114])


def test_no_ids() -> None:
    assert _embed([], Embedding(_table(3, 64, torch.float32))).shape == (0, 64)
