from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.sampling.token_counts import TokenCounts

TOKENS = st.lists(st.integers(0, 30), max_size=60)


def _as_dict(ids: object, counts: object) -> dict[int, int]:
    listed = [int(token_id) for token_id in ids]  # type: ignore[attr-defined]
    assert len(listed) == len(set(listed))
    return dict(zip(listed, map(int, counts), strict=True))  # type: ignore[call-overload]


@given(TOKENS, TOKENS, TOKENS)
def test_counts_are_of_the_output_and_list_the_prompt(
    prompt: list[int], output: list[int], drafts: list[int]
) -> None:
    counts = TokenCounts(prompt)
    for token_id in output:
        counts.add(token_id)
    expected = dict.fromkeys(prompt, 0) | Counter(output)
    assert counts.ids.dtype == counts.counts.dtype == "int32"
    assert _as_dict(counts.ids, counts.counts) == expected
    followed = counts.followed_by(drafts)
    assert [column.dtype for column in followed] == ["int32", "int32"]
    assert _as_dict(*followed) == dict.fromkeys(prompt, 0) | Counter(output + drafts)
    assert _as_dict(counts.ids, counts.counts) == expected  # assuming leaves no trace
