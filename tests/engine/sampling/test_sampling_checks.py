from __future__ import annotations

import math
from typing import Any

import pytest

from nybble.engine.errors import InvalidRequestError
from nybble.engine.messages import SamplingParams
from nybble.engine.sampling.sampling_checks import check_sampling

NAN, INF = math.nan, math.inf


def _check(**sampling: Any) -> None:
    check_sampling(SamplingParams(**({"max_tokens": 5} | sampling)), 100)


GOOD: list[dict[str, Any]] = [
    {},
    {"min_tokens": 5},
    {"temperature": 0.0},
    {"top_k": 2**31 - 1},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 5.0},
    {"logit_bias": ((0, -100.0), (99, 100.0))},
    {"allowed_token_ids": (0, 99)},
    {"bad_words": ((5, 99), (3,))},
    {"stop_token_ids": (0, 2**31 - 1), "min_tokens": 3},
    {"seed": 2**63 - 1, "num_logprobs": 20},
    {"allowed_token_ids": (1, 2), "stop_token_ids": (1,), "min_tokens": 1, "bad_words": ((3,), (2, 1))},
]


@pytest.mark.parametrize("sampling", GOOD, ids=str)
def test_accepts(sampling: dict[str, Any]) -> None:
    _check(**sampling)


BAD: list[tuple[str, Any]] = [
    ("max_tokens", -1),
    ("num_prompt_logprobs", 21),
    ("min_tokens", -1),
    ("min_tokens", 6),
    *(("temperature", value) for value in (-0.1, NAN, INF)),
    *(("top_k", value) for value in (-1, 2**31)),
    *((name, value) for name in ("top_p", "min_p") for value in (-0.1, 1.1, NAN)),
    *((f"{kind}_penalty", value) for kind in ("presence", "frequency") for value in (-2.1, 2.1, NAN, INF)),
    *(("repetition_penalty", value) for value in (0.0, -1.0, 5.1, NAN, INF)),
    *(("seed", value) for value in (-1, 2**63)),
    *(("num_logprobs", value) for value in (-1, 21)),
    *(("stop_token_ids", value) for value in ((-1,), (2**31,), (1,) * 1025)),
    *(("logit_bias", ((token_id, 0.0),)) for token_id in (-1, 100)),
    *(("logit_bias", ((5, value),)) for value in (-100.1, 101.0, NAN, -INF)),
    ("logit_bias", ((5, 0.0),) * 1025),
    *(("allowed_token_ids", value) for value in ((), (-1,), (5, 100))),
    *(("bad_words", value) for value in (((),), ((100,),), ((5, -1),), ((1,) * 65,), ((1,),) * 1025)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:30])
def test_refuses_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        _check(**{name: value})
    assert caught.value.parameter == name
    assert name in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("sampling", "parameter"),
    [
        ({"allowed_token_ids": (1, 2), "bad_words": ((1,), (2,))}, "allowed_token_ids"),
        ({"allowed_token_ids": (7,), "stop_token_ids": (7,), "min_tokens": 1}, "allowed_token_ids"),
        ({"bad_words": tuple((token_id,) for token_id in range(100))}, "bad_words"),
    ],
)
def test_some_token_must_be_left(sampling: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        _check(**sampling)
    assert caught.value.parameter == parameter
