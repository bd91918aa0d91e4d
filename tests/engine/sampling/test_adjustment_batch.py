"""Every row's rules, applied to logits, against the definition."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import adjusted_logits

from nybble.engine.messages import SamplingParams
from nybble.engine.sampling.adjustment_batch import adjustments_of
from nybble.engine.sampling.logit_rules import logit_rules
from nybble.engine.scheduling.step import Chunk
from nybble.kernels.logit_adjustments import adjust_logits

NUM_TOKENS = 5
CPU = torch.device("cpu")

_TOKEN = st.integers(0, NUM_TOKENS - 1)
_TOKENS = st.lists(_TOKEN, max_size=5)
_SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": st.sampled_from([-1.5, 0.5]),
        "frequency_penalty": st.sampled_from([-0.5, 2.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.5]),
        "logit_bias": st.dictionaries(_TOKEN, st.sampled_from([-3.0, 4.5]), max_size=2).map(
            lambda bias: tuple(bias.items())
        ),
        "allowed_token_ids": st.lists(_TOKEN, min_size=2, max_size=4, unique=True).map(tuple),
        "bad_words": st.lists(st.lists(_TOKEN, min_size=2, max_size=3).map(tuple), max_size=1).map(tuple),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.just((0,)),
    },
)
_REQUEST = st.tuples(_SAMPLING, _TOKENS, _TOKENS, _TOKENS)


def _chunk(sampling: dict[str, Any], prompt: list[int], output: list[int], drafts: list[int]) -> Chunk:
    params = SamplingParams(max_tokens=99, **sampling)
    rules = logit_rules(prompt, params, NUM_TOKENS)
    for token_id in output if rules is not None else ():
        rules.append(token_id)
    return Chunk("r", [9, *drafts], 0, [0], params, num_drafts=len(drafts), rules=rules)


@settings(deadline=None)
@given(st.lists(_REQUEST, min_size=1, max_size=5))
def test_rows_are_adjusted_as_defined(
    requests: list[tuple[dict[str, Any], list[int], list[int], list[int]]],
) -> None:
    chunks = [_chunk(*request) for request in requests]
    num_rows = sum(len(drafts) + 1 for _, _, _, drafts in requests)
    logits = torch.randn(num_rows, NUM_TOKENS, generator=torch.Generator().manual_seed(0))
    expected = [
        (chunk.sampling, prompt, output + drafts[:count])
        for chunk, (_, prompt, output, drafts) in zip(chunks, requests, strict=True)
        for count in range(len(drafts) + 1)
    ]
    adjustments, adjusted = adjustments_of(chunks, CPU), logits.clone()
    assert (adjustments is None) == all(chunk.rules is None for chunk in chunks)
    if adjustments is not None:
        adjust_logits(adjusted, adjustments)
    for row, (params, prompt, output) in enumerate(expected):
        assert params is not None
        wanted = torch.tensor(adjusted_logits(logits[row].tolist(), params, prompt, output))
        if wanted.isfinite().any():  # else bad words give way
            torch.testing.assert_close(adjusted[row], wanted, rtol=1e-5, atol=1e-5)


def test_nothing_is_made_for_what_no_row_has() -> None:
    biased = _chunk({"logit_bias": ((1, 2.0),)}, [], [], [])
    adjustments = adjustments_of([_chunk({}, [1], [2], []), biased], CPU)
    assert adjustments is not None and adjustments.bias is not None
    assert adjustments.bias.row_starts.tolist() == [0, 0, 1]
    assert adjustments.penalties is None and adjustments.allowed is None
