"""Which experts the tokens of a benchmark case go to: the same in every run, measured or modelled."""

from __future__ import annotations

import torch
from torch import Tensor

_SEED = 47


def expert_ids(num_tokens: int, num_experts: int, top_k: int, routing: str) -> Tensor:
    """int32 [num_tokens, top_k] on the CPU, the ids of a token distinct.

    routing: "uniform", or "zipf": the nth most frequent expert is drawn with a weight of 1 / n. Of such
    weights the largest of log(weight) + Gumbel noise are a draw without replacement.
    """
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.rand(num_tokens, num_experts, generator=generator)
    scores = -(-noise.clamp(min=1e-12).log()).clamp(min=1e-12).log()
    if routing == "zipf":
        ranks = torch.randperm(num_experts, generator=generator) + 1
        scores = scores - ranks.log()
    return scores.topk(top_k).indices.int()


def expert_counts(ids: Tensor, num_experts: int) -> list[int]:
    """Of each expert how many tokens go there."""
    counts: list[int] = torch.bincount(ids.flatten().cpu(), minlength=num_experts).tolist()
    return counts
