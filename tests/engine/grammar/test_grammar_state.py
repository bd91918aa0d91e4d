"""Answers that follow a grammar, with whatever logits, and drafts that may break it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_answer import ids, random_answer
from tiny_tokenizer import tiny_tokenizer

from nybble.engine.grammar.grammar import Grammar, Thought
from nybble.engine.grammar.grammar_compiler import GrammarCompiler
from nybble.engine.grammar.grammar_state import MAX_DIGITS, GrammarState
from nybble.engine.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(directory)
    return GrammarCompiler(directory)


def end_of(tokenizer: Tokenizer) -> int:
    found = tokenizer.added_token_id("<|end|>")
    assert found is not None
    return found


def text_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, token_ids)).decode()


_names = st.sampled_from(["a", "b", "name", "a key", 'qu"ote', "ü", "good"])
_leaves = st.one_of(
    st.just({}),
    st.sampled_from([{"type": t} for t in ("string", "integer", "number", "boolean", "null", "object")]),
    st.tuples(st.integers(-50, 50), st.integers(0, 50)).map(
        lambda t: {"type": "integer", "minimum": t[0], "maximum": t[0] + t[1]}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 5)).map(
        lambda t: {"type": "string", "minLength": t[0], "maxLength": t[0] + t[1]}
    ),
    st.lists(st.one_of(st.integers(-9, 9), st.text(max_size=4), st.none(), st.booleans()), min_size=1).map(
        lambda values: {"enum": values}
    ),
    st.one_of(st.integers(-(2**53), 2**53), _names).map(lambda value: {"const": value}),
    st.sampled_from([{"type": "string", "pattern": p} for p in ("^[a-f]{2,4}$", "^(x|yz)+$", "[0-9]")]),
    st.sampled_from([{"type": "string", "format": f} for f in ("date", "uuid", "ipv4", "email", "time")]),
)


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def shape(parts: tuple[dict[str, Any], bool, bool]) -> dict[str, Any]:
        properties, is_closed, is_required = parts
        found: dict[str, Any] = {"type": "object", "properties": properties}
        if is_closed:
            found["additionalProperties"] = False
        if is_required:
            found["required"] = list(properties)
        return found

    return st.tuples(st.dictionaries(_names, inner, max_size=3), st.booleans(), st.booleans()).map(shape)


def _arrays(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(inner, st.integers(0, 2), st.integers(0, 3)).map(
        lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
    )


def _either(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})


schemas = st.recursive(
    _leaves, lambda inner: st.one_of(_objects(inner), _arrays(inner), _either(inner)), max_leaves=8
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_answers_to_generated_schemas_are_valid(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any], seed: int
) -> None:
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    end = end_of(tokenizer)
    token_ids = random_answer(compiler.start(grammar, (end,)), random.Random(seed), end, num_tokens=60)
    jsonschema.Draft202012Validator(schema).validate(json.loads(text_of(tokenizer, token_ids)))


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
        {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"},
        {"enum": [f"value {i}" for i in range(2000)]},
    ],
)
def test_answers_to_schemas_without_bounds_are_valid(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any]
) -> None:
    end = end_of(tokenizer)
    for seed in range(5):
        state = compiler.start(Grammar(kind="json_schema", text=json.dumps(schema)), (end,))
        text = text_of(tokenizer, random_answer(state, random.Random(seed), end, num_tokens=40))
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_a_grammar_begins_after_the_thought(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    end, thought = end_of(tokenizer), tokenizer.added_token_id("</think>")
    assert thought is not None
    state = compiler.start(Grammar(kind="regex", text="ab", thought=Thought(end_token_id=thought)), (end,))
    for drafts in ((), (ord("y"),)):
        words = state.allowed_words(drafts)
        assert words is not None and ids(words) == [
            t for t in range(1000) if tokenizer.has_token_id(t) and t != end
        ]
    state.append(ord("x"))
    found = state.allowed_words((ord("y"), thought, ord("a")))
    assert found is not None and ids(found) == [ord("b")]
    state.append(thought)
    found = state.allowed_words()
    assert found is not None and ids(found) == [ord("a")]


def started(tokenizer: Tokenizer, compiler: GrammarCompiler, regex: str) -> tuple[GrammarState, int, int]:
    """Of a model that may think or not: the state, and the tags of a thought."""
    start, end = (tokenizer.encode(tag)[0] for tag in ("<think>", "</think>"))
    thought = Thought(end_token_id=end, start_token_id=start)
    state = compiler.start(Grammar(kind="regex", text=regex, thought=thought), (end_of(tokenizer),))
    return state, start, end


def allowed(state: GrammarState, drafts: Sequence[int] = ()) -> set[int]:
    words = state.allowed_words(drafts)
    assert words is not None and state.failure is None
    return set(ids(words))


SPACES = set(b" \n\r\t")


def test_a_thought_may_be_left_out(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    state, start, _ = started(tokenizer, compiler, "ab")
    assert allowed(state) == {start, ord("a")} | SPACES
    state.append(ord("a"))
    assert allowed(state) == {ord("b")}
    state.append(ord("b"))
    assert allowed(state) == {end_of(tokenizer)}


def test_after_white_space_that_the_form_does_not_have_comes_a_thought(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    state, start, end = started(tokenizer, compiler, "ab|  x")
    state.append(ord(" "))
    assert allowed(state) == {start} | SPACES  # the second space may be one of the form's
    state.append(ord("\n"))
    assert allowed(state) == {start} | SPACES
    state.append(ord(" "))
    assert allowed(state) == {start}
    state.append(start)
    assert end in allowed(state) and end_of(tokenizer) not in allowed(state)
    state.append(end)
    assert allowed(state) == {ord("a"), ord(" ")}


def test_white_space_of_the_form_is_no_start_of_a_thought(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    state, start, _ = started(tokenizer, compiler, " {2,4}x")
    for _ in range(2):
        assert start in allowed(state)
        state.append(ord(" "))
    assert allowed(state) == {start, ord("x")} | SPACES
    state.append(ord("x"))
    assert allowed(state) == {end_of(tokenizer)}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(drafts=st.lists(st.sampled_from([*b"ab \n", 272, 273]), max_size=5), num_taken=st.integers(0, 3))
def test_drafts_at_the_start_are_as_their_tokens(
    tokenizer: Tokenizer, compiler: GrammarCompiler, drafts: list[int], num_taken: int
) -> None:
    state, start, end = started(tokenizer, compiler, "a? ?b*a")
    drafts = [{272: start, 273: end}.get(t, t) for t in drafts]
    plain, _, _ = started(tokenizer, compiler, "a? ?b*a")
    taken = drafts[:num_taken]
    for token_id in taken:
        if token_id not in allowed(state):
            return
        state.append(token_id)
        plain.append(token_id)
    rest = drafts[num_taken:]
    for count in range(len(rest) + 1):
        assert allowed(state, rest[:count]) == allowed(plain)
        if count == len(rest) or rest[count] not in allowed(plain):
            return
        plain.append(rest[count])


def test_reserved_tags_are_not_spelled(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    start, end = (tokenizer.encode(tag)[0] for tag in ("<think>", "</think>"))
    grammar = Grammar(
        kind="calls",
        text=f"start: /(?s:.*)/ <[{start}]> @content",
        content=Grammar(kind="json_schema", text='{"type": "string"}'),
        reserved_token_ids=(start,),
        thought=Thought(end_token_id=end),
    )
    state = compiler.start(grammar, (end_of(tokenizer),))
    for part in (b"a<thin", b"<think", b'"<think'):
        for byte in part:
            assert byte in allowed(state)
            state.append(byte)
        assert ord("k") not in part[-1:] or ord(">") not in allowed(state)
        assert ord(">") not in allowed(state) or part == b"a<thin"
        if part == b"<think":
            assert start in allowed(state)
            state.append(start)
        elif part == b"a<thin":
            assert start not in allowed(state) and end in allowed(state)
            assert ord(">") not in allowed(state, (ord("k"),))
            state.append(end)
    assert allowed(state, (ord("x"),)) >= {ord(">"), ord('"')}


def test_the_end_comes_only_where_the_grammar_may_end(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    end = end_of(tokenizer)
    state = compiler.start(Grammar(kind="regex", text="ab?"), (end, 10**6))
    expected = [[ord("a")], [ord("b"), end], [end]]
    for token_id, allowed in zip((ord("a"), ord("b"), end), expected, strict=True):
        words = state.allowed_words()
        assert words is not None and ids(words) == allowed
        state.append(token_id)
    assert state.failure is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drafts=st.lists(st.sampled_from([*b'ab[]1,"', 260]), max_size=4), seed=st.integers(0, 99))
def test_after_drafts_is_what_would_be_after_their_tokens(
    tokenizer: Tokenizer, compiler: GrammarCompiler, drafts: list[int], seed: int
) -> None:
    end, rng = end_of(tokenizer), random.Random(seed)
    grammar = Grammar(kind="json_schema", text='{"type": "array"}')
    state, plain = compiler.start(grammar, (end,)), compiler.start(grammar, (end,))
    for _ in range(rng.randrange(4)):
        words = plain.allowed_words()
        assert words is not None
        token_id = rng.choice([t for t in ids(words) if t != end])
        state.append(token_id)
        plain.append(token_id)
        if ids(words) == [end]:
            return
    found = [state.allowed_words(drafts[:count]) for count in range(len(drafts) + 1)]
    again = state.allowed_words()
    for count, words in enumerate(found):
        expected = plain.allowed_words()
        assert words is not None and expected is not None and (words == expected).all()
        if count == len(drafts) or drafts[count] not in ids(expected) or drafts[count] == end:
            break
        plain.append(drafts[count])
    assert again is not None and found[0] is not None and (again == found[0]).all()
    assert state.failure is None


def test_a_token_that_breaks_the_grammar_is_a_failure(compiler: GrammarCompiler) -> None:
    state = compiler.start(Grammar(kind="regex", text="ab"), (260,))
    state.append(ord("x"))
    assert state.failure is not None and "grammar" in state.failure
    assert state.allowed_words() is None
    state.append(ord("a"))


def allows_digit(state: GrammarState, drafts: Sequence[int] = ()) -> bool:
    words = state.allowed_words(drafts)
    return words is not None and ord("7") in ids(words)


@pytest.mark.parametrize(
    ("schema", "before", "is_bounded"),
    [
        ({"type": "integer"}, "", True),
        ({"type": "number"}, "0.", True),
        ({"type": "array"}, "[1,", True),
        ({"type": "string"}, '"', False),
        ({"type": "string", "pattern": "^7{99}$"}, '"', False),  # nothing else may come
    ],
)
def test_runs_of_digits_in_numbers_are_bounded(
    compiler: GrammarCompiler, schema: dict[str, Any], before: str, is_bounded: bool
) -> None:
    state = compiler.start(Grammar(kind="json_schema", text=json.dumps(schema)), (260,))
    for token_id in before.encode():
        state.append(token_id)
    for _ in range(MAX_DIGITS - 2):
        state.append(ord("7"))
    two = (ord("7"), ord("7"))
    assert allows_digit(state, two[:1]) and allows_digit(state, two) is not is_bounded
    state.append(two[0])
    assert allows_digit(state)
    state.append(two[1])
    assert allows_digit(state) is not is_bounded and state.failure is None
