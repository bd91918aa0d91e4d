"""From logits to tokens and log-probabilities, each row by its own request's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from nybble.engine.messages import SamplingParams, TokenLogprobs
from nybble.engine.step import Chunk, SampledToken
from nybble.kernels.ops import Ops, SamplingBatch, W
from nybble.kernels.random_bits import draw_bits


class Sampler(Generic[W]):
    """num_token_ids: ids from here on are padding of the vocabulary and never sampled."""

    def __init__(self, ops: Ops[W], num_token_ids: int) -> None:
        self._ops = ops
        self._num_token_ids = num_token_ids

    def sample(self, logits: Tensor, chunks: Sequence[Chunk]) -> list[SampledToken]:
        """One token for each row of logits, float32 [S, V]; row s follows chunks[s]."""
        logits = logits[:, : self._num_token_ids]
        params = [_sampling_of(chunk) for chunk in chunks]
        batch = _sampling_batch(chunks, params, logits.device)
        token_ids = self._ops.sample(logits, batch).tolist()
        return [
            SampledToken(token_id, _logprobs(row, token_id, p.num_logprobs))
            for row, token_id, p in zip(logits, token_ids, params, strict=True)
        ]


def _sampling_of(chunk: Chunk) -> SamplingParams:
    if chunk.sampling is None:
        raise ValueError(f"request {chunk.request_id}: its chunk has nothing to sample")
    return chunk.sampling


def _sampling_batch(
    chunks: Sequence[Chunk], params: Sequence[SamplingParams], device: torch.device
) -> SamplingBatch:
    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    draws = [
        draw_bits(p.seed or 0, chunk.start + len(chunk.token_ids))
        for p, chunk in zip(params, chunks, strict=True)
    ]
    return SamplingBatch(
        temperatures=column([_temperature(p) for p in params], torch.float32),
        top_ks=column([p.top_k for p in params], torch.int64),
        top_ps=column([p.top_p for p in params], torch.float32),
        min_ps=column([p.min_p for p in params], torch.float32),
        draws=column(draws, torch.int64),
    )


def _temperature(params: SamplingParams) -> float:
    """Dividing by less than this overflows float32; the pick is the likeliest token anyway."""
    return params.temperature if params.temperature >= 1e-5 else 0.0


def _logprobs(row: Tensor, token_id: int, count: int | None) -> TokenLogprobs | None:
    """Of the unmodified distribution: before temperature and truncation."""
    if count is None:
        return None
    logprobs = row.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, len(row)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(logprob=logprobs[token_id].item(), top=top)
