"""Rows of logits with requests of their own, and what the reference picks from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.ops import SamplingBatch
from nybble.kernels.random_bits import draw_bits
from nybble.kernels.reference_ops import ReferenceOps
from nybble.kernels.triton.sampling import SamplingLaunch, sample, sampling_launch


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)


def request_batch(*requests: tuple[float, int, float, float], seed: int = 0) -> SamplingBatch:
    """A row for each (temperature, top_k, top_p, min_p), with the random bits of successive positions."""
    temperatures, top_ks, top_ps, min_ps = zip(*requests, strict=True)
    draws = [draw_bits(seed, position) for position in range(len(requests))]
    return SamplingBatch(
        temperatures=torch.tensor(temperatures, dtype=torch.float32, device=DEVICE),
        top_ks=torch.tensor(top_ks, device=DEVICE),
        top_ps=torch.tensor(top_ps, dtype=torch.float32, device=DEVICE),
        min_ps=torch.tensor(min_ps, dtype=torch.float32, device=DEVICE),
        draws=torch.tensor(draws, device=DEVICE),
    )


def picks(
    logits: Tensor,
    batch: SamplingBatch,
    num_token_ids: int | None = None,
    launch: SamplingLaunch | None = None,
) -> list[int]:
    num_columns = logits.shape[1]
    launch = launch or sampling_launch(num_columns, ARCHES[0])
    found = sample(logits, batch, num_token_ids or num_columns, launch=launch)
    assert found.dtype == torch.int64
    return found.tolist()


def reference_picks(logits: Tensor, batch: SamplingBatch, num_token_ids: int | None = None) -> list[int]:
    return ReferenceOps(torch.float32).sample(logits, batch, num_token_ids or logits.shape[1]).tolist()


def small_launch(chunk: int = 128, tile: int = 1024) -> SamplingLaunch:
    """A short row has several chunks, and as a rule one tile: the interpreter takes long over more."""
    return SamplingLaunch(chunk, 1, tile, 1)


def repeated(requests: Sequence[tuple[float, int, float, float]], count: int) -> SamplingBatch:
    """The requests over and over, `count` rows in all."""
    return request_batch(*(requests[row % len(requests)] for row in range(count)))
