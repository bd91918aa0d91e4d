"""The distribution that a token must have, by definition: float64, one token at a time, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nybble.engine.messages import SamplingParams


def adjusted_logits(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """OpenAI: mu[j] + bias[j] - c[j] * frequency - (c[j] > 0) * presence; repetition as in vLLM, between
    bias and penalties. Tokens that cannot come get -inf."""
    bias = dict(params.logit_bias)
    result = []
    for token, logit in enumerate(logits):
        x = logit + bias.get(token, 0.0)
        if token in prompt or token in output:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        count = list(output).count(token)
        x = x - count * params.frequency_penalty - (params.presence_penalty if count else 0.0)
        result.append(x if _may_come(token, params, list(output)) else -math.inf)
    return result


def token_distribution(adjusted: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """Token -> probability after temperature, min_p, top_k and top_p, in this order."""
    best = max(adjusted)
    if params.temperature == 0:
        return {list(adjusted).index(best): 1.0}
    weights = [math.exp((x - best) / params.temperature) for x in adjusted]
    kept = [(weight, token) for token, weight in enumerate(weights) if weight >= params.min_p]
    kept = sorted(kept, key=lambda pair: -pair[0])[: params.top_k or None]
    total, mass, nucleus = sum(weight for weight, _ in kept), 0.0, []
    for weight, token in kept:
        if nucleus and params.top_p < 1 and mass >= params.top_p:
            break
        nucleus.append((weight, token))
        mass += weight / total
    total = sum(weight for weight, _ in nucleus)
    return {token: weight / total for weight, token in nucleus if weight}


def assert_distributed(picks: Sequence[int], expected: dict[int, float]) -> None:
    """A chi-square test, far in the tail: of correct picks it refuses fewer than one set in 10,000."""
    assert set(picks) <= set(expected)
    statistic = sum((picks.count(t) - p * len(picks)) ** 2 / (p * len(picks)) for t, p in expected.items())
    freedom = len(expected) - 1
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom) + 8


def _may_come(token: int, params: SamplingParams, output: list[int]) -> bool:
    if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
        return False
    if token in params.stop_token_ids and len(output) < params.min_tokens:
        return False
    ends = [*output, token]
    return not any(ends[-len(word) :] == list(word) for word in params.bad_words)
