"""The prefix cache through the engine: what is shared, what goes first, what is said about it."""

from __future__ import annotations

import pytest
from engine_harness import BLOCK_SIZE, Harness, distinct_prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.messages import CacheExplanation

SYSTEM = distinct_prompt(13, first=1)


def _run(
    harness: Harness, request_id: str, prompt: tuple[int, ...], max_tokens: int = 4, **fields: object
) -> int:
    """To its end; returns how many of the prompt's tokens were cached."""
    harness.add(request_id, prompt, max_tokens, **fields)  # type: ignore[arg-type]
    harness.drain()
    harness.assert_right_tokens(request_id, max_tokens)
    return harness.num_cached[request_id]


def test_a_system_prompt_is_shared() -> None:
    harness = Harness()
    assert _run(harness, "a", (*SYSTEM, 1, 2, 3)) == 0
    assert _run(harness, "b", (*SYSTEM, 7, 7, 7, 7, 7)) == 12
    harness.add("c", (*SYSTEM, 5), 4)
    harness.add("d", (*SYSTEM, 6), 4)  # while c runs
    harness.drain()
    assert (harness.num_cached["c"], harness.num_cached["d"]) == (12, 12)


def test_every_turn_of_a_chat_finds_the_one_before() -> None:
    """Prompt and answer, all but the last token, whose keys and values nobody has computed."""
    harness, chat = Harness(), SYSTEM
    for turn in range(5):
        num_known = len(chat) - 1
        chat = (*chat, 3, turn, 5)
        num_cached = _run(harness, str(turn), chat, max_tokens=6)
        assert num_cached == (num_known // BLOCK_SIZE * BLOCK_SIZE if turn else 0)
        chat = (*chat, *harness.tokens[str(turn)])


# Salts.


def test_salts_share_nothing_and_change_no_token() -> None:
    harness = Harness()
    for salt in ("", "ann", "bob"):
        assert _run(harness, f"{salt} 1", SYSTEM, cache_salt=salt) == 0
        assert _run(harness, f"{salt} 2", SYSTEM, cache_salt=salt) == 12
    assert len({tuple(tokens) for tokens in harness.tokens.values()}) == 1


# Eviction.


class _LeastRecentlyUsed:
    """The cache by its rules: a list of free blocks in the order in which they were let go."""

    def __init__(self, num_blocks: int) -> None:
        # What each block holds, with all before it.
        self.free: list[tuple[int, ...] | None] = [None] * num_blocks

    def run(self, prompt: tuple[int, ...], output: list[int]) -> int:
        """Returns the number of cached tokens."""
        num_cached = 0
        while num_cached + BLOCK_SIZE < len(prompt) and prompt[: num_cached + BLOCK_SIZE] in self.free:
            num_cached += BLOCK_SIZE
        held = [prompt[:end] for end in range(BLOCK_SIZE, num_cached + 1, BLOCK_SIZE)]
        for content in held:
            self.free.remove(content)
        computed = (*prompt, *output[:-1])
        for start in range(num_cached, len(computed), BLOCK_SIZE):
            del self.free[0]
            content = computed[: start + BLOCK_SIZE]
            is_full = len(content) == start + BLOCK_SIZE
            held.append(content if is_full else None)  # type: ignore[arg-type]
        # One that another block holds already is not kept twice.
        held = [None if content in self.free else content for content in held]  # type: ignore[misc]
        self.free += held[::-1]
        return num_cached


_PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(_PROMPTS, st.integers(1, 6)), max_size=25), st.integers(6, 14))
def test_the_least_recently_used_block_goes_first(
    requests: list[tuple[tuple[int, ...], int]], num_blocks: int
) -> None:
    harness, model = Harness(num_blocks=num_blocks), _LeastRecentlyUsed(num_blocks)
    for number, (prompt, max_tokens) in enumerate(requests):
        num_cached = _run(harness, str(number), prompt, max_tokens)
        assert num_cached == model.run(prompt, harness.tokens[str(number)])


# Explanations.


def _explained(harness: Harness, prompt: tuple[int, ...], **fields: object) -> CacheExplanation:
    request_id = f"asked {len(harness.prompts)}"
    _run(harness, request_id, prompt, explain_cache=True, **fields)
    return harness.explanations[request_id]


def test_only_who_asks_is_told_and_once() -> None:
    harness = Harness()
    _run(harness, "a", SYSTEM)
    assert harness.explanations == {}
    _explained(harness, SYSTEM)
    assert len(harness.explanations) == 1


def test_nothing_like_it_was_seen() -> None:
    assert _explained(Harness(), SYSTEM) == CacheExplanation(reason="never_seen")
    harness = Harness()
    _run(harness, "a", SYSTEM[:9], max_tokens=1)
    assert _explained(harness, SYSTEM) == CacheExplanation(reason="never_seen")  # from token 8 on


@pytest.mark.parametrize("position", range(12))
def test_the_first_token_that_differs_is_named(position: int) -> None:
    harness = Harness()
    _run(harness, "a", SYSTEM)
    other = list(SYSTEM)
    other[position] = (other[position] + 1) % 8
    expected = CacheExplanation(reason="different_token", first_differing_token=position)
    assert _explained(harness, tuple(other)) == expected


def test_of_several_prefixes_the_closest_counts() -> None:
    harness = Harness()
    for number, token in enumerate((2, 3)):
        _run(harness, str(number), (*SYSTEM[:4], *[token] * (number + 1), 1, 1, 1, 1, 1), max_tokens=1)
    found = _explained(harness, (*SYSTEM[:4], 3, 3, 7, 7, 7))
    assert found == CacheExplanation(reason="different_token", first_differing_token=6)


@pytest.mark.parametrize("length", [3, 4, 5, 12, 13])
def test_the_last_block_is_never_cached(length: int) -> None:
    harness = Harness()
    _run(harness, "a", SYSTEM)
    assert _explained(harness, SYSTEM[:length]) == CacheExplanation(reason="last_block")


def test_what_was_overwritten_is_called_evicted() -> None:
    harness = Harness(num_blocks=8)
    _run(harness, "a", SYSTEM)
    for first in (2, 4):
        _run(harness, f"other {first}", distinct_prompt(20, first))
    assert _explained(harness, SYSTEM) == CacheExplanation(reason="evicted")


def test_other_salts_are_not_told_of() -> None:
    """The same as if nobody had ever asked for this."""
    harness = Harness(num_blocks=8)
    _run(harness, "a", SYSTEM, cache_salt="ann")
    other = (*SYSTEM[:6], 0, 0, 0, 0, 0, 0, 0)
    assert _explained(harness, other, cache_salt="bob") == CacheExplanation(reason="never_seen")
    for first in (2, 4):
        _run(harness, f"other {first}", distinct_prompt(20, first))
    assert _explained(harness, SYSTEM, cache_salt="carol") == CacheExplanation(reason="never_seen")


def test_without_a_prefix_cache() -> None:
    harness = Harness(enable_prefix_caching=False)
    _run(harness, "a", SYSTEM)
    assert _explained(harness, SYSTEM) == CacheExplanation(reason="off")
