"""Literals and regular expressions as llguidance reads them, and where lines are from."""

from __future__ import annotations

import pytest
from llguidance import LLMatcher

from nybble.server.grammars.lark_text import LarkText, literal, regex


def _problem(rule: str) -> str:
    return LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(f"start: {rule}"))


@pytest.mark.parametrize("text", ["a", '"', "\\", "a\nb\tc", "ü€😀", "\x00\x7f", "/", "#", "//"])
def test_a_literal(text: str) -> None:
    assert _problem(literal(text)) == ""


@pytest.mark.parametrize("pattern", ["a/b", r"a\/b", "a\nb", r"[/\\]", "(?:)", "#", '"'])
def test_a_regular_expression(pattern: str) -> None:
    assert _problem(regex(pattern)) == ""


def test_rules_and_their_places() -> None:
    rules = LarkText()
    assert rules.add("value", '"a"', "one") == "value0"
    rules.set("start", "value0", "two")
    assert rules.text == 'value0: "a"\nstart: value0' and rules.places == ("one", "two")
