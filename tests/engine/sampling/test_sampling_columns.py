"""What `Sampler` draws with is tested there; here, that columns which are kept are never another batch's."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
import torch

from nybble.engine.messages import SamplingParams
from nybble.engine.sampling.sampling_columns import SamplingColumns
from nybble.engine.scheduling.step import Chunk
from nybble.kernels.ops import SamplingBatch
from nybble.kernels.random_bits import draw_bits

CPU = torch.device("cpu")


def params_of(count: int) -> list[SamplingParams]:
    return [
        SamplingParams(
            max_tokens=9, temperature=0.5 + n, top_k=n, top_p=0.9 - n / 100, min_p=n / 100, seed=2**62 + n
        )
        for n in range(count)
    ]


def chunks_of(params: Sequence[SamplingParams], start: int, num_drafts: int = 0) -> list[Chunk]:
    token_ids = list(range(1 + num_drafts))
    return [Chunk(str(n), token_ids, start + n, [0], p, num_drafts) for n, p in enumerate(params)]


def check(batch: SamplingBatch, params: Sequence[SamplingParams], positions: Sequence[int]) -> None:
    assert torch.equal(batch.temperatures, torch.tensor([p.temperature for p in params]))
    assert batch.top_ks.tolist() == [p.top_k for p in params]
    assert torch.equal(batch.top_ps, torch.tensor([p.top_p for p in params]))
    assert torch.equal(batch.min_ps, torch.tensor([p.min_p for p in params]))
    seeds = [p.seed or 0 for p in params]
    assert batch.draws.tolist() == [draw_bits(s, p) for s, p in zip(seeds, positions, strict=True)]


@pytest.mark.parametrize("count", [1, 2, 31, 32, 100])
def test_each_row_has_its_requests_parameters_and_its_own_bits(count: int) -> None:
    columns, params = SamplingColumns(), params_of(count)
    for start in (5, 6):
        batch = columns.batch(chunks_of(params, start), params, CPU)
        check(batch, params, [start + n + 1 for n in range(count)])


def test_another_batch_has_other_columns() -> None:
    columns, params = SamplingColumns(), params_of(4)
    for rows in ([0, 1], [1, 0], [1, 0, 2], [2], [3]):
        chosen = [params[row] for row in rows]
        check(columns.batch(chunks_of(chosen, 7), chosen, CPU), chosen, [8 + n for n in range(len(rows))])
    equal = msgspec.structs.replace(params[3], temperature=0.1)
    check(columns.batch(chunks_of([equal], 7), [equal], CPU), [equal], [8])


def test_drafts_have_rows_of_their_own() -> None:
    params = params_of(1)
    batch = SamplingColumns().batch(chunks_of(params, 7, num_drafts=2), params * 3, CPU)
    check(batch, params * 3, [8, 9, 10])


def test_the_smallest_temperatures_are_greedy() -> None:
    params = [SamplingParams(max_tokens=1, temperature=t) for t in (0.0, 9e-6, 1e-5)]
    batch = SamplingColumns().batch(chunks_of(params, 0), params, CPU)
    assert torch.equal(batch.temperatures, torch.tensor([0.0, 0.0, 1e-5]))
