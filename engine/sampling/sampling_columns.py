"""What a step's rows of logits are drawn with, as the columns of a `SamplingBatch`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nybble.engine.messages import SamplingParams
from nybble.engine.scheduling.step import Chunk
from nybble.kernels.ops import SamplingBatch
from nybble.kernels.random_bits import draw_bits, draw_bits_of

_SMALLEST_TEMPERATURE = 1e-5
"""Dividing by less overflows float32; the pick is the likeliest token anyway."""
_MANY_ROWS = 12  # from here on numpy is the faster one: 14 us for 12 rows, and 17 for 64


class SamplingColumns:
    """From parameters to columns on the device. Those that are the requests' own are kept while the rows are
    of the same requests, step after step."""

    def __init__(self) -> None:
        self._params: Sequence[SamplingParams] = ()
        self._own: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def batch(
        self, chunks: Sequence[Chunk], params: Sequence[SamplingParams], device: torch.device
    ) -> SamplingBatch:
        """params: of each row, as many for a chunk as it has rows."""
        if self._own is None or not _are_same(params, self._params):
            self._params, self._own = params, _own_columns(params, device)
        temperatures, top_ks, top_ps, min_ps = self._own
        return SamplingBatch(
            temperatures=temperatures,
            top_ks=top_ks,
            top_ps=top_ps,
            min_ps=min_ps,
            draws=_draws(params, list(_positions(chunks))).to(device),
        )


def _are_same(params: Sequence[SamplingParams], others: Sequence[SamplingParams]) -> bool:
    return len(params) == len(others) and all(own is other for own, other in zip(params, others, strict=True))


def _own_columns(
    params: Sequence[SamplingParams], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """temperatures, top_ks, top_ps, min_ps, in one transfer: int64, then float32 ones, two in the place of
    one."""
    columns = np.empty((4, len(params)), dtype=np.int64)
    columns[0] = [p.top_k for p in params]
    floats = columns[1:].view(np.float32)[:, : len(params)]
    floats[0] = [_temperature(p) for p in params]
    floats[1] = [p.top_p for p in params]
    floats[2] = [p.min_p for p in params]
    moved = torch.from_numpy(columns).to(device)
    temperatures, top_ps, min_ps = moved[1:].view(torch.float32)[:, : len(params)]
    return temperatures, moved[0], top_ps, min_ps


def _draws(params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """int64 [S] random bits, by the rows' seeds and positions."""
    if len(params) < _MANY_ROWS:
        rows = zip(params, positions, strict=True)
        return torch.tensor([draw_bits(p.seed or 0, position) for p, position in rows], dtype=torch.int64)
    seeds = np.array([p.seed or 0 for p in params], dtype=np.uint64)
    return torch.from_numpy(draw_bits_of(seeds, np.array(positions)))


def _positions(chunks: Sequence[Chunk]) -> Iterator[int]:
    """That of the token which each row gives."""
    for chunk in chunks:
        end = chunk.start + len(chunk.token_ids)
        yield from range(end - chunk.num_drafts, end + 1)


def _temperature(params: SamplingParams) -> float:
    return params.temperature if params.temperature >= _SMALLEST_TEMPERATURE else 0.0
