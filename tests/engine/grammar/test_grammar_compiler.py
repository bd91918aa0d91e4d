"""What compiles, what is refused, and which tokens a compiled grammar leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizer import write_tokenizer

from nybble.engine.errors import InvalidRequestError
from nybble.engine.grammar.grammar import MAX_GRAMMAR_BYTES, Grammar
from nybble.engine.grammar.grammar_compiler import MAX_SPACES, GrammarCompiler


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return GrammarCompiler(directory)


def allows(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    """Whether a text, byte by byte, is an answer: the first 256 tokens are the bytes."""
    state = compiler.start(grammar, stop_token_ids=(260,))
    for token_id in (*text.encode(), 260):
        words = state.allowed_words()
        assert words is not None
        if not words[token_id // 32] >> (token_id % 32) & 1:
            return False
        state.append(token_id)
    return state.failure is None


def schema(value: object, is_lenient: bool = False) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(value), is_lenient=is_lenient)


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (Grammar(kind="regex", text="[ab]{2}c?"), ["ab", "bbc"], ["a", "abcc", "xab", ""]),
        (Grammar(kind="lark", text='start: "x" | "(" start ")"'), ["x", "((x))"], ["(x", "y", "()"]),
        (Grammar(kind="lark", text='root ::= [0-9]+ ("," root)?'), ["12", "1,2,33"], ["1,", "a"]),
        (schema({"type": "object"}), ["{}", '{"a": [1, null]}', "{\n}"], ["[]", "1", "{", '{"a"}']),
        (schema({}), ["{}", "1", '"a"', "null", "[true]"], ["", "nul", "01"]),
        (schema({"enum": ["a", 2]}), ['"a"', "2"], ["a", "3"]),
        (schema({"type": "integer", "minimum": 3, "maximum": 12}), ["3", "12"], ["2", "13", "3.5"]),
        (schema({"oneOf": [{"type": "string"}, {"const": 1}]}), ['"a"', "1"], ["2"]),
        (schema({"oneOf": [{"type": "string"}, {"minLength": 2}]}, is_lenient=True), ['"ab"'], []),
    ],
)
def test_answers_that_are_allowed(
    compiler: GrammarCompiler, grammar: Grammar, right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not allows(compiler, grammar, text)] == []
    assert [text for text in wrong if allows(compiler, grammar, text)] == []


def test_runs_of_white_space_are_bounded(compiler: GrammarCompiler) -> None:
    assert allows(compiler, schema({}), "[1," + " " * MAX_SPACES + "2]")
    assert not allows(compiler, schema({}), "[1," + " " * (MAX_SPACES + 1) + "2]")
    ours = schema({"type": "object", "x-guidance": {"whitespace_pattern": "[ ]*"}})
    assert not allows(compiler, ours, "{" + " " * (MAX_SPACES + 1) + "}")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(kind="regex", text="(a"), "unclosed group"),
        (Grammar(kind="regex", text="(?=a)a"), "look-around"),
        (Grammar(kind="regex", text="(" * 5000 + "a" + ")" * 5000), "grammar: "),
        (Grammar(kind="lark", text="start: other"), "unknown name"),
        (Grammar(kind="lark", text="start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
        (Grammar(kind="lark", text='root ::= "a'), "grammar: "),
        (Grammar(kind="json_schema", text="{"), "malformed"),
        (schema(3), "grammar: "),
        (schema(False), "object schema"),
        (schema({"$ref": "#"}), "grammar: "),
        (schema({"$ref": "#/nowhere"}), "grammar: "),
        (schema({"$ref": "http://example.com/schema"}), "grammar: "),
        (schema({"type": "elephant"}), "elephant"),
        (schema({"oneOf": [{"type": "string"}, {"minLength": 2}]}), "alternatives that may overlap; anyOf"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Grammar(kind="json_schema", text='{"items":' * 5000 + "{}" + "}" * 5000), "grammar: "),
        (Grammar(kind="regex", text="a" * (MAX_GRAMMAR_BYTES + 1)), "longer than"),
    ],
)
def test_a_bad_grammar_is_refused(compiler: GrammarCompiler, grammar: Grammar, message: str) -> None:
    for _ in range(2):  # compiled, and known
        with pytest.raises(InvalidRequestError, match=message) as error:
            compiler.start(grammar, stop_token_ids=(260,))
        assert error.value.parameter == "grammar"
        assert len(str(error.value)) < 400


def test_what_cannot_be_checked_is_ignored_if_the_schema_is_lenient(compiler: GrammarCompiler) -> None:
    assert allows(compiler, schema({"type": "array", "uniqueItems": True}, is_lenient=True), "[1, 1]")


def test_recursion_enums_and_nesting_within_limits(compiler: GrammarCompiler) -> None:
    tree = schema({"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False})
    assert allows(compiler, tree, '{"next": ' * 50 + "{}" + "}" * 50)
    words = schema({"enum": [f"value {i}" for i in range(3000)]})
    assert allows(compiler, words, '"value 2999"') and not allows(compiler, words, '"value 3000"')
    deep: dict[str, object] = {"type": "integer"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    assert allows(compiler, schema(deep), "[" * 40 + "7" + "]" * 40)


def test_an_answer_that_cannot_end_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError, match="stop token"):
        compiler.start(Grammar(kind="regex", text="a"), stop_token_ids=())


def test_a_checkpoint_without_a_tokenizer_has_no_grammars(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        GrammarCompiler(tmp_path).start(Grammar(kind="regex", text="a"), stop_token_ids=(1,))
