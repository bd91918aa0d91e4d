"""Which sampling parameters the engine takes: one request's bad number must not reach the tensors that all
requests share."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nybble.engine.errors import InvalidRequestError
from nybble.engine.messages import SamplingParams

MAX_LOGPROBS = 20
MAX_LIST_LENGTH = 1024  # of stop token ids, biases and bad words, which are looked at in every step
MAX_BAD_WORD_LENGTH = 64  # tokens

_MAX_ID = (1 << 31) - 1


def check_sampling(sampling: SamplingParams, num_token_ids: int) -> None:
    """Raises InvalidRequestError, which names the parameter at fault."""
    _check_ranges(sampling)
    _check_lists(sampling, num_token_ids)
    if sampling.grammar is not None and sampling.allowed_token_ids is not None:
        raise InvalidRequestError(
            f"allowed_token_ids: not together with {sampling.grammar.parameter}", "allowed_token_ids"
        )
    _check_some_token_is_left(sampling, num_token_ids)


def _check_ranges(sampling: SamplingParams) -> None:
    p = sampling
    num_logprobs = 0 if p.num_logprobs is None else p.num_logprobs
    num_prompt_logprobs = 0 if p.num_prompt_logprobs is None else p.num_prompt_logprobs
    # Comparisons with NaN are false.
    is_valid = {
        "max_tokens": p.max_tokens >= 0,
        "min_tokens": 0 <= p.min_tokens <= p.max_tokens,
        "temperature": 0 <= p.temperature < math.inf,
        "top_k": 0 <= p.top_k < 1 << 31,
        "top_p": 0 <= p.top_p <= 1,
        "min_p": 0 <= p.min_p <= 1,
        "presence_penalty": -2 <= p.presence_penalty <= 2,
        "frequency_penalty": -2 <= p.frequency_penalty <= 2,
        "repetition_penalty": 0.01 <= p.repetition_penalty <= 5,
        "seed": p.seed is None or 0 <= p.seed < 1 << 63,
        "num_logprobs": 0 <= num_logprobs <= MAX_LOGPROBS,
        "num_prompt_logprobs": 0 <= num_prompt_logprobs <= MAX_LOGPROBS,
    }
    for name, is_ok in is_valid.items():
        if not is_ok:
            raise InvalidRequestError(f"{name} is {getattr(p, name)!r}, out of range", name)


def _check_lists(sampling: SamplingParams, num_token_ids: int) -> None:
    # A stop token may be one that the tokenizer does not know, and hence never come.
    _check_ids("stop_token_ids", sampling.stop_token_ids, _MAX_ID)
    _check_ids("logit_bias", (token_id for token_id, _ in sampling.logit_bias), num_token_ids - 1)
    _check_ids("allowed_token_ids", sampling.allowed_token_ids or (), num_token_ids - 1)
    budget = sampling.thinking_budget
    if budget is not None:
        _check_ids("thinking_budget", budget.end_token_ids, num_token_ids - 1)
        if budget.num_tokens < 0 or not budget.end_token_ids:
            raise InvalidRequestError(
                "thinking_budget: expected 0 tokens or more, and an end", "thinking_budget"
            )
    for word in sampling.bad_words:
        if not 1 <= len(word) <= MAX_BAD_WORD_LENGTH:
            raise InvalidRequestError(
                f"bad_words: a word has {len(word)} tokens, expected 1 to {MAX_BAD_WORD_LENGTH}", "bad_words"
            )
        _check_ids("bad_words", word, num_token_ids - 1)
    for name in ("stop_token_ids", "logit_bias", "bad_words"):
        if len(getattr(sampling, name)) > MAX_LIST_LENGTH:
            raise InvalidRequestError(f"{name} has more than {MAX_LIST_LENGTH} entries", name)
    for token_id, bias in sampling.logit_bias:
        if not -100 <= bias <= 100:
            raise InvalidRequestError(
                f"logit_bias: that of token {token_id} is {bias!r}, expected -100 to 100", "logit_bias"
            )


def _check_ids(name: str, token_ids: Iterable[int], largest: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id <= largest:
            raise InvalidRequestError(f"{name}: token id {token_id} is not in 0 .. {largest}", name)


def _check_some_token_is_left(sampling: SamplingParams, num_token_ids: int) -> None:
    banned = {word[0] for word in sampling.bad_words if len(word) == 1}
    if sampling.min_tokens:
        banned.update(token_id for token_id in sampling.stop_token_ids if token_id < num_token_ids)
    if sampling.allowed_token_ids is None:
        if len(banned) >= num_token_ids:
            raise InvalidRequestError("bad_words and stop_token_ids leave no token", "bad_words")
    elif banned.issuperset(sampling.allowed_token_ids):
        raise InvalidRequestError(
            "allowed_token_ids has no token that bad_words and min_tokens leave", "allowed_token_ids"
        )
