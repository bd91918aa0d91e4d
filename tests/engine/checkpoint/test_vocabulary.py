from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from nybble.engine.checkpoint.vocabulary import count_token_ids
from nybble.engine.errors import CheckpointError


def _save(directory: Path, vocabulary: dict[str, int], special: tuple[str, ...] = ()) -> None:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    ("vocabulary", "special", "expected"),
    [
        ({"a": 0}, (), 1),
        ({"a": 0, "b": 1, "c": 2}, (), 3),
        ({"a": 0, "b": 9}, (), 10),
        ({"a": 0, "b": 1}, ("<|user|>", "<|end|>"), 4),
    ],
)
def test_one_more_than_the_largest_id(
    vocabulary: dict[str, int], special: tuple[str, ...], expected: int, tmp_path: Path
) -> None:
    _save(tmp_path, vocabulary, special)
    assert count_token_ids(tmp_path, 100) == expected
    assert count_token_ids(tmp_path, expected) == expected


def test_without_a_tokenizer_all_ids_count(tmp_path: Path) -> None:
    assert count_token_ids(tmp_path, 123) == 123


def test_more_ids_than_rows_are_refused(tmp_path: Path) -> None:
    _save(tmp_path, {"a": 0, "b": 10})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has 11 token ids, but vocab_size is 10"):
        count_token_ids(tmp_path, 10)


def test_an_empty_vocabulary_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, {})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has 0 token ids"):
        count_token_ids(tmp_path, 10)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"\xff\xfe", b'{"model": {"type": "Unheard of"}}'], ids=repr
)
def test_a_malformed_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        count_token_ids(tmp_path, 10)
