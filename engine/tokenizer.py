"""Tokenizer and chat template of a checkpoint: the one place that uses transformers.

GLM's tokenizer is a byte-level BPE, so every token stands for exact bytes. They are kept as bytes here:
a character whose bytes are spread over several tokens is put together by the detokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing may be fetched at run time

from jinja2.exceptions import TemplateError
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer

from nybble.engine.errors import CheckpointError, InvalidRequestError, NybbleError
from nybble.engine.token_marks import TokenMarks


class ChatTemplateError(NybbleError):
    """The chat template cannot render these messages."""


class ContinuationError(ChatTemplateError):
    """The chat template cannot render the last message so that it can be gone on with."""


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered chat, and its tokens."""

    text: str
    token_ids: tuple[int, ...]


class Tokenizer:
    """Text to token ids and back, and messages to prompts."""

    def __init__(self, directory: Path) -> None:
        """Read `directory`. Raises CheckpointError if its tokenizer cannot be used."""
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such checkpoint directory")
        if not (directory / "tokenizer.json").exists():
            raise CheckpointError(f"{directory / 'tokenizer.json'}: no such file")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the libraries below raise bare Exception
            raise CheckpointError(f"{directory}: its tokenizer cannot be read: {error}") from error
        self._added = self._tokenizer.added_tokens_decoder
        self._special_ids = {token_id for token_id, token in self._added.items() if token.special}
        self._num_tokens = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self._bytes_of_token: dict[int, bytes] = {}  # of those asked for
        self._bytes_of_character = _bytes_of_characters()
        self._reserved_names = self._find_reserved_names()
        self._check_byte_level(directory)
        self._check_template(directory)
        self.takes_argument_text = self._shows_argument_text()  # of calls, instead of an object

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
        """Token ids of a text or rendered prompt, whose special tokens are read as such.

        add_special_tokens: put those before and after it that the checkpoint's tokenizer says (GLM's: none).

        Raises:
            InvalidRequestError: it holds half of a surrogate pair, which is no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the prompt is not text: {error}", "prompt") from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of a text in which nothing is a special or otherwise added token."""
        backend = self._tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        splitter = backend.pre_tokenizer
        pieces = [(text, None)] if splitter is None else splitter.pre_tokenize_str(text)
        return tuple(token.id for piece, _ in pieces for token in backend.model.tokenize(piece))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, bool] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> ChatPrompt:
        """The rendered prompt, of which special tokens are only those that the template itself writes.

        What messages and tools hold is text, whatever it looks like, but for a switch that the template
        looks for in it (/nothink) and the tags of a thought in an assistant's content. Arguments and errors
        are those of `render_chat` and `encode`.

        continue_final_message: the prompt ends with the content of the last message, to go on with it.
        Raises ContinuationError if the template does not show its end, or shows it more than once.
        """
        marks = TokenMarks(self._reserved_names)
        marked_messages = marks.mark_messages(messages)
        marked_tools = [marks.mark_value(tool) for tool in tools]
        if continue_final_message:
            marked_messages[-1]["content"] += marks.end
        text = self.render_chat(
            marked_messages, marked_tools, options, add_generation_prompt=add_generation_prompt
        )
        if continue_final_message:
            text, *rest = text.split(marks.end)
            if len(rest) != 1:
                raise ContinuationError("the chat template does not show the end of the last message once")
        plain = text.replace(marks.mark, "")
        if plain == text:
            return ChatPrompt(text, self.encode(text))
        return ChatPrompt(plain, self._encode_marked(text, marks.mark))

    def _encode_marked(self, text: str, mark: str) -> tuple[int, ...]:
        """As `encode` does it, sections between added tokens one by one; those with marks as plain text."""
        self.encode(text)  # refuses what is no text
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        token_ids, done = list[int](), 0
        for token_id, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            if token_id in self._added:
                token_ids += [*self._encode_section(text[done:start], mark), token_id]
                done = end
        return (*token_ids, *self._encode_section(text[done:], mark))

    def _encode_section(self, text: str, mark: str) -> tuple[int, ...]:
        return self.encode_text(text.replace(mark, "")) if mark in text else self.encode(text)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, bool] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for an assistant turn after `messages`, by the checkpoint's own template.

        tools: as the OpenAI API has them; options: variables of the template, such as enable_thinking;
        add_generation_prompt False: the messages only, without the beginning of that turn.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages.
        """
        if not self.has_chat_template:
            raise ChatTemplateError("the checkpoint has no chat template")
        try:
            prompt: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(options or {}),
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ChatTemplateError(f"the chat template refuses the messages: {error}") from error
        return prompt

    def added_token_id(self, text: str) -> int | None:
        """Of a token that the checkpoint adds, such as `</think>`; None if it has none of that text."""
        found = (token_id for token_id, token in self._added.items() if token.content == text)
        return next(found, None)

    def is_special(self, token_id: int) -> bool:
        """Whether a token is control, such as an end of turn, and no part of the text."""
        return token_id in self._special_ids

    def is_added(self, token_id: int) -> bool:
        """Whether a token is special or a tag: no other is ever merged with it."""
        return token_id in self._added

    def has_token(self, text: str) -> bool:
        """Whether a text is one of the tokens that are added to the vocabulary, such as a tag."""
        return any(token.content == text for token in self._added.values())

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; of a special token, those of its name."""
        found = self._bytes_of_token.get(token_id)
        if found is None:
            found = self._bytes_of_token[token_id] = self._find_bytes(token_id)
        return found

    def has_token_id(self, token_id: int) -> bool:
        """Whether a token id stands for bytes."""
        return 0 <= token_id < self._num_tokens and (
            token_id in self._added or self._tokenizer.convert_ids_to_tokens(token_id) is not None
        )

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens, special ones by their names; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            content: str = self._added[token_id].content
            return content.encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id) if token_id >= 0 else None
        if token is None:
            raise ValueError(f"token id {token_id} is not in the vocabulary")
        return bytes(self._bytes_of_character[character] for character in token)

    def _find_reserved_names(self) -> list[str]:
        """Of added tokens that control the model: special ones and tags, but for what a user may switch."""
        names = [token.content for token in self._added.values() if token.special or token.content[:1] == "<"]
        switches = {name for name in ("/nothink",) if name in str(self._tokenizer.chat_template)}
        return [name for name in names if name not in switches]

    def _check_template(self, directory: Path) -> None:
        if self.has_chat_template:
            try:
                self.render_chat([{"role": "user", "content": "?"}])
            except ChatTemplateError as error:
                raise CheckpointError(f"{directory}: {error}") from error

    def _shows_argument_text(self) -> bool:
        """Whether the template shows a call's arguments that are a text; GLM's take objects only."""
        text = "torn"
        call = {"type": "function", "function": {"name": "f", "arguments": text}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            return text in self.render_chat([{"role": "user", "content": "?"}, turn])
        except ChatTemplateError:
            return False

    def _check_byte_level(self, directory: Path) -> None:
        """Tokens must be made of the 256 byte characters, and be decoded as such."""
        decoder = self._tokenizer.backend_tokenizer.decoder
        vocabulary = self._tokenizer.get_vocab()
        used = set().union(*(token for token, i in vocabulary.items() if i not in self._added))
        if not isinstance(decoder, ByteLevel) or not used <= self._bytes_of_character.keys():
            raise CheckpointError(f"{directory}: its tokenizer is not a byte-level BPE")


def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (GPT-2, `bytes_to_unicode`).

    Printable bytes of Latin-1 stand for themselves; the other 68, in order, are U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
