"""What a request changes of its logits, token by token, against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_oracle import adjusted_logits

from nybble.engine.messages import SamplingParams
from nybble.engine.sampling.logit_rules import LogitRules, logit_rules

NUM_TOKENS = 6


def _rules(prompt: tuple[int, ...] = (), **sampling: Any) -> LogitRules:
    rules = logit_rules(prompt, SamplingParams(**({"max_tokens": 99} | sampling)), NUM_TOKENS)
    assert rules is not None
    return rules


def _bias(rules: LogitRules, *drafts: int) -> dict[int, float]:
    bias = rules.bias(drafts)
    return {} if bias is None else dict(zip(bias.ids.tolist(), bias.values.tolist(), strict=True))


def test_a_request_that_changes_nothing_has_no_rules() -> None:
    sampling = SamplingParams(max_tokens=5, temperature=0.3, top_k=3, num_logprobs=4, stop_token_ids=(1,))
    assert logit_rules((1, 2), sampling, NUM_TOKENS) is None


def test_stop_tokens_are_banned_until_there_are_min_tokens() -> None:
    rules = _rules(min_tokens=2, stop_token_ids=(1, 4, 77), logit_bias=((4, 3.0), (5, -1.0)))
    assert _bias(rules) == {4: -math.inf, 5: -1.0, 1: -math.inf}
    assert _bias(rules, 0) == _bias(rules)
    assert _bias(rules, 0, 0) == {4: 3.0, 5: -1.0}
    rules.append(0)
    rules.append(0)
    assert _bias(rules) == {4: 3.0, 5: -1.0}


def test_bias_is_the_same_object_while_nothing_changes() -> None:
    rules = _rules(min_tokens=2, stop_token_ids=(1,), logit_bias=((4, 3.0),))
    first = rules.bias()
    rules.append(0)
    assert rules.bias() is first


def test_bad_words_give_way_where_nothing_else_is_allowed() -> None:
    rules = _rules(allowed_token_ids=(2, 3), bad_words=((2, 2), (2, 3)))
    assert _bias(rules) == {}
    rules.append(2)
    assert _bias(rules) == {}
    rules.append(3)
    assert _bias(rules, 5) == {}


@pytest.mark.parametrize(
    ("sampling", "ids"),
    [
        ({"presence_penalty": 1.0}, []),
        ({"frequency_penalty": 1.0}, []),
        ({"repetition_penalty": 1.1}, [3, 5]),
    ],
)
def test_only_the_repetition_penalty_lists_the_prompt(sampling: dict[str, float], ids: list[int]) -> None:
    counts = _rules((5, 3, 5), **sampling).counts
    assert counts is not None
    assert sorted(counts.ids.tolist()) == ids


def test_rules_without_penalties_count_nothing() -> None:
    assert _rules((5, 3), logit_bias=((1, 1.0),)).counts is None


TOKEN = st.integers(0, NUM_TOKENS - 1)
WORDS = st.lists(st.lists(TOKEN, min_size=1, max_size=3).map(tuple), max_size=3)
LISTS = st.fixed_dictionaries(
    {
        "logit_bias": st.dictionaries(TOKEN, st.floats(-100, 100, width=32), max_size=3).map(
            lambda bias: tuple(bias.items())
        ),
        "bad_words": WORDS.map(tuple),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(TOKEN, max_size=2).map(tuple),
    }
)


@given(LISTS, st.lists(TOKEN, max_size=6), st.lists(TOKEN, max_size=3))
def test_bias_and_bans_are_those_of_the_definition(
    lists: dict[str, Any], output: list[int], drafts: list[int]
) -> None:
    sampling = SamplingParams(max_tokens=99, **lists)
    rules = LogitRules((), sampling, NUM_TOKENS)
    for token_id in output:
        rules.append(token_id)
    found = _bias(rules, *drafts)
    expected = adjusted_logits([0.0] * NUM_TOKENS, sampling, (), output + drafts)
    if max(expected) > -math.inf:
        assert [found.get(token_id, 0.0) for token_id in range(NUM_TOKENS)] == expected


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 70])
def test_allowed_tokens_are_bits(num_tokens: int) -> None:
    allowed = tuple(range(0, num_tokens, 3))
    rules = logit_rules((), SamplingParams(max_tokens=1, allowed_token_ids=allowed), num_tokens)
    assert rules is not None
    words = rules.allowed_words()
    assert words is not None and words.dtype == "int32"
    bits = [int(word) >> bit & 1 for word in words for bit in range(32)]
    assert [token_id for token_id, bit in enumerate(bits) if bit] == list(allowed)
