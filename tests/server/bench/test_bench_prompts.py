from __future__ import annotations

import pytest

from nybble.engine.errors import OptionError
from nybble.server.bench.bench_prompts import MIN_UNIQUE_WORDS, Prompts, fit_prompts


def _count(prompt: str) -> int:
    return 9 + len(prompt.split())


def test_lengths_are_met_exactly_where_a_word_is_a_token() -> None:
    prompts = fit_prompts(300, 100, 0, "nonce", _count)
    texts = [prompts.text(number) for number in range(20)]
    assert {_count(text) for text in texts} == {300}
    heads = {" ".join(text.split()[:100]) for text in texts}
    assert len(heads) == 1 and len({" ".join(text.split()[100:112]) for text in texts}) == 20


def test_lengths_are_near_where_a_word_is_not() -> None:
    prompts = fit_prompts(2000, 0, 0, "nonce", lambda prompt: 5 + len(prompt))
    assert all(abs(5 + len(prompts.text(number)) - 2000) < 200 for number in range(20))


def test_no_two_prompts_begin_alike_in_any_run() -> None:
    texts = [Prompts(30, 0, 0, nonce).text(number) for nonce in "ab" for number in range(200)]
    assert len({" ".join(text.split()[:MIN_UNIQUE_WORDS]) for text in texts}) == 400
    assert Prompts(30, 0, 0, "a").text(3) == Prompts(30, 0, 0, "a").text(3)


@pytest.mark.parametrize(("total", "shared"), [(20, 0), (100, 80)])
def test_too_short(total: int, shared: int) -> None:
    with pytest.raises(OptionError, match="20 tokens of a prompt are its own, expected at least 21"):
        fit_prompts(total, shared, 0, "nonce", _count)
