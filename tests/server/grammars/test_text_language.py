"""The texts that a schema allows: just those that a validator finds right."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from nybble.server.grammars.lark_text import InexpressibleError
from nybble.server.grammars.schema_references import SchemaReferences
from nybble.server.grammars.text_language import TextLanguage, without

ROOT = {"$defs": {"word": {"pattern": "^[ab]+$"}, "self": {"$ref": "#/$defs/self"}}}


def language_of(schema: Any, is_lenient: bool = False) -> str | None:
    return TextLanguage(SchemaReferences(ROOT), "<end>", is_lenient).of(schema)


@pytest.fixture(scope="module")
def bytes_only() -> LLTokenizer:
    return LLTokenizer("byte")


def has(tokenizer: LLTokenizer, language: str | None, text: str) -> bool:
    if language is None:
        return False
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {language}"), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = list(text.encode())
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


_texts = st.text(alphabet="ab c/\n", max_size=4)
_simple = st.one_of(
    st.sampled_from([{}, True, False, {"type": "string"}, {"type": "integer"}, {"type": ["null", "string"]}]),
    st.lists(st.one_of(_texts, st.integers(0, 3)), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    _texts.map(lambda text: {"const": text}),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
        lambda t: {"minLength": t[0], "maxLength": t[0] + t[1]}
    ),
    st.sampled_from([{"pattern": p} for p in ("a", "^a", "b$", "^(ab|c)*$", "a.b", "/")]),
    st.just({"$ref": "#/$defs/word"}),
)
_schemas = st.recursive(
    _simple,
    lambda inner: st.one_of(
        *(
            st.lists(inner, min_size=1, max_size=3).map(lambda parts, key=key: {key: parts})
            for key in ("anyOf", "allOf", "oneOf")
        ),
        inner.map(lambda part: {"not": part}),
        st.tuples(_simple, inner).map(lambda pair: {"anyOf": [pair[1], True], "allOf": [pair[0], pair[1]]}),
    ),
    max_leaves=5,
)


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schema=_schemas, texts=st.lists(_texts, min_size=1, max_size=6))
def test_it_is_what_a_validator_finds_right(bytes_only: LLTokenizer, schema: Any, texts: list[str]) -> None:
    whole = ROOT | schema if isinstance(schema, dict) else schema
    validator = jsonschema.Draft202012Validator(whole)
    language = language_of(schema)
    for text in texts:
        if not text.endswith("\n"):  # where Python's $ matches before it
            assert has(bytes_only, language, text) is validator.is_valid(text), text


def test_texts_without_others(bytes_only: LLTokenizer) -> None:
    language = without('"a" | "b" | "c"', '"a"', '"b" | "d"')
    assert [text for text in "abcd" if has(bytes_only, language, text)] == ["c"]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#/$defs/self"}, "refers to itself"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"format": "colour"}, "not known"),
        ({"if": {}, "then": {}}, "cannot be expressed"),
        ({"anyOf": [{"minLength": 1}] * 3000}, "too many parts"),
    ],
)
def test_what_cannot_be_expressed(schema: Any, message: str) -> None:
    with pytest.raises(InexpressibleError, match=message):
        language_of(schema)


def test_what_cannot_be_checked_is_ignored_if_asked_for() -> None:
    assert language_of({"format": "colour", "if": {}, "pattern": "(?=a)"}, is_lenient=True) == language_of({})


def test_the_end_of_a_value_is_in_none(bytes_only: LLTokenizer) -> None:
    assert language_of({"const": "a<end>"}) is None
    assert has(bytes_only, language_of({"enum": ["a<end>", "b"]}), "b")
