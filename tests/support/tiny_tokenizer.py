"""Writes a small byte-level BPE tokenizer with a chat template, as a checkpoint directory holds it.

Token ids 0 to 255 are the bytes of those values; merged words and added tokens follow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from nybble.engine.tokenizer import Tokenizer

WORDS = ("hello", "world", "and", "good")  # each is one token
SPECIAL_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
TEXT_TOKENS = ("<think>", "</think>")  # added, but part of the text

_TEMPLATE = """\
{%- for message in messages %}
{%- if message['content'] == 'forbidden' %}{{ raise_exception('that is forbidden') }}{% endif %}
{{- '<|' + message['role'] + '|>' + message['content'] }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def byte_alphabet() -> list[str]:
    """The character that stands for each byte, by the tokenizers library's own tables."""
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_byte: dict[int, str] = {}
    for code_point in (*range(0x800), *range(0x1000, 0x110000, 0x1000)):
        if not 0xD800 <= code_point < 0xE000:
            text = chr(code_point)
            of_byte.update(zip(text.encode(), encoder.pre_tokenize_str(text)[0][0], strict=True))
    # C0, C1 and F5 to FF never occur in UTF-8; what is printable in Latin-1 stands for itself.
    return [of_byte.get(byte, chr(byte)) for byte in range(256)]


def write_tokenizer(
    directory: Path,
    chat_template: str | None = _TEMPLATE,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    text_tokens: Sequence[str] = TEXT_TOKENS,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and, unless it is None, the chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in text_tokens])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template)


def tiny_tokenizer(directory: Path) -> Tokenizer:
    """Write and load."""
    write_tokenizer(directory)
    return Tokenizer(directory)
