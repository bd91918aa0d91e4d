"""How many token ids a checkpoint's tokenizer knows, read without importing transformers."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from nybble.engine.errors import CheckpointError


def count_token_ids(directory: Path, vocab_size: int) -> int:
    """One more than the largest id of `directory`/tokenizer.json; the rest up to `vocab_size` is padding.

    A checkpoint without the file can still be run by token ids, all of them.

    Raises:
        CheckpointError: the file is malformed, or has ids that the model has no row for.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return vocab_size
    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: not a readable tokenizer: {error}") from error
    count = max(vocabulary.values(), default=-1) + 1
    if not 1 <= count <= vocab_size:
        raise CheckpointError(f"{path}: has {count} token ids, but vocab_size is {vocab_size}")
    return count
