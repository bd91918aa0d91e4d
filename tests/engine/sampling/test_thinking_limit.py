from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.messages import SamplingParams
from nybble.engine.sampling.logit_rules import logit_rules
from nybble.engine.sampling.thinking_limit import ThinkingBudget, ThinkingLimit

NUM_TOKENS = 40
START, END, CALL = 33, 34, 35


def _limit(num_tokens: int, start: int | None = None) -> ThinkingLimit:
    budget = ThinkingBudget(num_tokens=num_tokens, end_token_ids=(END, CALL), start_token_id=start)
    return ThinkingLimit(budget, NUM_TOKENS)


def _is_due(output: Sequence[int], num_tokens: int, start: int | None) -> bool:
    """By definition: the thought is open and has its tokens."""
    if start is not None:
        if start not in output[:3]:
            return False
        output = output[output.index(start) + 1 :]
    return not {END, CALL} & set(output) and len(output) >= num_tokens


_tokens = st.lists(st.sampled_from([1, 2, START, END, CALL]), max_size=8)


@given(output=_tokens, drafts=_tokens, num_tokens=st.integers(0, 6), start=st.sampled_from([None, START]))
def test_the_end_is_forced_when_it_is_due(
    output: list[int], drafts: list[int], num_tokens: int, start: int | None
) -> None:
    limit = _limit(num_tokens, start)
    for token_id in output:
        limit.append(token_id)
    words = limit.forced_words(drafts)
    assert (words is not None) == _is_due([*output, *drafts], num_tokens, start)
    if words is not None:
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        assert np.flatnonzero(bits).tolist() == [END]


def test_it_is_forced_whatever_else_is_asked_for() -> None:
    sampling = SamplingParams(
        max_tokens=9,
        allowed_token_ids=(1, 2),
        bad_words=((END,),),
        thinking_budget=ThinkingBudget(num_tokens=2, end_token_ids=(END,)),
    )
    rules = logit_rules((), sampling, NUM_TOKENS)
    assert rules is not None
    for token_id in (1, 2):
        rules.append(token_id)
    words = rules.allowed_words()
    assert words is not None
    assert np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist() == [END]
    assert rules.bias() is None
    rules.append(END)
    assert rules.allowed_words() is not words
