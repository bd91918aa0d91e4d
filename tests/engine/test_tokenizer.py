from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_tokenizer
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from nybble.engine.errors import CheckpointError
from nybble.engine.tokenizer import ChatTemplateError, Tokenizer

USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _vocabulary(directory: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    return vocabulary


@pytest.fixture(scope="module")
def special_ids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    directory = tmp_path_factory.mktemp("vocabulary")
    tiny_tokenizer.write_tokenizer(directory)
    return _vocabulary(directory)


def test_the_tiny_alphabet_is_the_libraries() -> None:
    assert set(tiny_tokenizer.byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("byte", range(256))
def test_token_bytes_of_every_byte(tokenizer: Tokenizer, byte: int) -> None:
    assert tokenizer.token_bytes(byte) == bytes([byte])


@pytest.mark.parametrize("word", tiny_tokenizer.WORDS)
def test_a_merged_word_is_one_token(tokenizer: Tokenizer, word: str) -> None:
    (token_id,) = tokenizer.encode(word)
    assert token_id >= 256
    assert tokenizer.token_bytes(token_id) == word.encode()


@pytest.mark.parametrize("name", [*tiny_tokenizer.SPECIAL_TOKENS, *tiny_tokenizer.TEXT_TOKENS])
def test_added_tokens(tokenizer: Tokenizer, special_ids: dict[str, int], name: str) -> None:
    token_id = special_ids[name]
    assert tokenizer.encode(f"a{name}b") == (ord("a"), token_id, ord("b"))
    assert tokenizer.token_bytes(token_id) == name.encode()
    assert tokenizer.is_special(token_id) == (name in tiny_tokenizer.SPECIAL_TOKENS)


def test_ordinary_tokens_are_not_special(tokenizer: Tokenizer) -> None:
    assert not any(map(tokenizer.is_special, range(256)))


@pytest.mark.parametrize("token_id", [1000, 1 << 20])
def test_an_unknown_token_id(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match=str(token_id)):
        tokenizer.token_bytes(token_id)


_pieces = st.sampled_from(
    [*tiny_tokenizer.WORDS, *tiny_tokenizer.SPECIAL_TOKENS, *tiny_tokenizer.TEXT_TOKENS]
)


@settings(deadline=None)  # a busy machine is not a failure
@given(text=st.lists(st.text() | _pieces).map("".join))
def test_token_bytes_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


@pytest.mark.parametrize(
    "text", ["", " ", "  hello", "hello ", "\n\n\t", "e\u0301", "\u00e9", " 's", "\x00", "\ufffd", "\u2581a"]
)
def test_nothing_is_cleaned_up(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_render_chat_adds_the_assistant_turn(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "be kind"}, USER]
    assert tokenizer.render_chat(messages) == "<|system|>be kind<|user|>hello<|assistant|>"


def test_a_template_gets_tools_and_options(tmp_path: Path) -> None:
    template = (
        "{{ tools | tojson if tools else 'no tools' }}{{ enable_thinking is defined and enable_thinking }}"
    )
    tiny_tokenizer.write_tokenizer(tmp_path, template)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.render_chat([USER]) == "no toolsFalse"
    tools = [{"type": "function", "function": {"name": "f"}}]
    rendered = tokenizer.render_chat([USER], tools, {"enable_thinking": True})
    assert rendered == json.dumps(tools) + "True"


def test_added_tokens_are_known_by_their_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.has_token("<think>") and tokenizer.has_token("<|end|>")
    assert not tokenizer.has_token("hello") and not tokenizer.has_token("<nothing>")


def test_a_template_refusal_keeps_its_reason(tokenizer: Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="that is forbidden"):
        tokenizer.render_chat([{"role": "user", "content": "forbidden"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing.attribute }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 'x' | int('y') + messages }}",
        "{{ messages[0].content.no_such_method() }}",
        "{{ '%d' | format('x') }}",
        "{% for message in messages %}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_that_cannot_work_is_refused_at_the_start(tmp_path: Path, template: str) -> None:
    tiny_tokenizer.write_tokenizer(tmp_path, template)
    with pytest.raises(CheckpointError, match="the chat template refuses the messages"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "wrong", ["{{ messages[1].content }}", "{{ messages[1]['x'] + 1 }}", "{{ [][0].x }}"]
)
def test_a_template_may_fail_on_some_messages(tmp_path: Path, wrong: str) -> None:
    template = "{% if messages[0]['content'] == 'long' %}" + wrong + "{% endif %}"
    tiny_tokenizer.write_tokenizer(tmp_path, template)
    with pytest.raises(ChatTemplateError, match="the chat template refuses the messages"):
        Tokenizer(tmp_path).render_chat([{"role": "user", "content": "long"}])


def test_no_template(tmp_path: Path) -> None:
    tiny_tokenizer.write_tokenizer(tmp_path, chat_template=None)
    tokenizer = Tokenizer(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.render_chat([USER])


def test_a_template_is_found(tokenizer: Tokenizer) -> None:
    assert tokenizer.has_chat_template


@pytest.mark.parametrize(
    ("directory", "message"),
    [("empty", r"empty/tokenizer\.json: no such file"), ("absent", "absent: no such checkpoint directory")],
)
def test_missing_tokenizer_json(tmp_path: Path, directory: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path / directory)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "Unheard"}}'])
def test_broken_tokenizer_json(tmp_path: Path, content: str) -> None:
    tiny_tokenizer.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        Tokenizer(tmp_path)


def test_a_vocabulary_that_is_not_byte_level(tmp_path: Path) -> None:
    tiny_tokenizer.write_tokenizer(tmp_path)
    sentencepiece_like = tokenizers.Tokenizer(models.BPE({"a": 0, "\u2581": 1, "\u2581a": 2}, []))
    sentencepiece_like.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="not a byte-level BPE"):
        Tokenizer(tmp_path)
