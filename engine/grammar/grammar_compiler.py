"""Compiles grammars for a checkpoint's tokenizer, with llguidance.

It matches bytes, so how a text is cut into tokens is left to the model. Its end of text is a token that is
added to the vocabulary: `GrammarState` puts the request's stop tokens in its place.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from nybble.engine.grammar.grammar import MAX_CALLS_BYTES, MAX_GRAMMAR_BYTES, Fault, Grammar
from nybble.engine.grammar.grammar_state import GrammarState, summary
from nybble.engine.grammar.grammar_tokens import GrammarTokens

MAX_SPACES = 32  # one after the other between the tokens of JSON: a model can be caught in endless ones

_NUM_KEPT = 64  # grammars that stay compiled

# Of the library's defaults, a fifth of the memory and work that are bounded here.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False
)


class GrammarCompiler:
    """For a checkpoint's tokenizer, read when it is first needed. May be used from several threads."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "tokenizer.json"
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._read: GrammarTokens | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher | Fault] = OrderedDict()

    def compile(self, grammar: Grammar) -> None:
        """Compile it, with the mask of its first token, unless it is. `start` says what is wrong with it."""
        self._get(grammar)

    def fault(self, grammar: Grammar) -> Fault | None:
        """What is wrong with it, if something is."""
        compiled = self._get(grammar)
        return compiled if isinstance(compiled, Fault) else None

    def start(self, grammar: Grammar, stop_token_ids: Sequence[int]) -> GrammarState:
        """For a new answer; stop_token_ids: what may end it.

        Raises:
            InvalidRequestError: the grammar is malformed, allows nothing or exceeds a limit.
        """
        compiled, tokens = self._get(grammar), self._tokens()
        if isinstance(compiled, Fault) or tokens is None:
            fault = compiled if isinstance(compiled, Fault) else _no_tokens(grammar)
            raise fault.error()
        stops = [token_id for token_id in stop_token_ids if token_id < tokens.num_token_ids]
        if not stops:
            raise Fault(grammar.parameter, "the answer must be able to end with a stop token").error()
        return GrammarState(compiled.deep_copy(), grammar, stops, tokens)

    def _get(self, grammar: Grammar) -> LLMatcher | Fault:
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found
        compiled = self._compile(grammar)  # outside the lock, for which the engine's loop may wait
        with self._lock:
            self._compiled[grammar] = compiled
            if len(self._compiled) > _NUM_KEPT:
                self._compiled.popitem(last=False)
        return compiled

    def _compile(self, grammar: Grammar) -> LLMatcher | Fault:
        tokens = self._tokens()
        if tokens is None:
            return _no_tokens(grammar)
        limit = MAX_CALLS_BYTES if grammar.kind == "calls" else MAX_GRAMMAR_BYTES
        if len(grammar.text.encode()) > limit:
            return Fault(grammar.parameter, f"longer than {limit} bytes")
        if grammar.content is not None and isinstance(fault := self._get(grammar.content), Fault):
            return fault
        try:
            source = _source(grammar)
        except ValueError as error:
            return Fault(grammar.parameter, f"malformed: {str(error)[:300]}")
        matcher = LLMatcher(tokens.matching, source, log_level=0, limits=_LIMITS)
        matcher.compute_bitmask()
        if matcher.is_error() or matcher.is_stopped():
            return _located(grammar, summary(matcher.get_error()) or "nothing is allowed by it")
        return matcher

    def _tokens(self) -> GrammarTokens | None:
        """None for a checkpoint without tokenizer.json."""
        with self._loading:
            if self._read is None and self._path.exists():
                self._read = GrammarTokens(self._path)
        return self._read


def _no_tokens(grammar: Grammar) -> Fault:
    return Fault(grammar.parameter, "the checkpoint has no tokenizer.json")


def _located(grammar: Grammar, error: str) -> Fault:
    """By the line that the library names, where lines are from different fields."""
    if "coerce_one_of" in error:
        error = re.sub(
            "oneOf constraints .*", "oneOf of alternatives that may overlap; anyOf may be meant", error
        )
    found = re.match(r"at (\d+)\(\d+\): ", error)
    index = int(found[1]) - 1 if found else -1
    if found and 0 <= index < len(grammar.line_parameters):
        return Fault(grammar.line_parameters[index], error[found.end() :])
    return Fault(grammar.parameter, error)


def _source(grammar: Grammar) -> str:
    """What the library compiles. Raises ValueError: not JSON, or malformed GBNF."""
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(_as_lark(grammar.text))
    if grammar.kind == "calls":
        return json.dumps({"grammars": list(_named(grammar))})
    return LLMatcher.grammar_from_json_schema(
        grammar.text,
        overrides={
            "whitespace_flexible": True,
            "whitespace_pattern": rf"[ \n\r\t]{{1,{MAX_SPACES}}}",
            "item_separator": ",",
            "key_separator": ":",
            "coerce_one_of": grammar.is_lenient,
            "lenient": grammar.is_lenient,
        },
    )


def _named(grammar: Grammar) -> Iterator[dict[str, Any]]:
    """The parts of one of tool calls, the main one first."""
    yield {"name": "calls", "lark_grammar": grammar.text}
    if grammar.content is not None:
        (content,) = json.loads(_source(grammar.content))["grammars"]
        yield content | {"name": "content"}


def _as_lark(text: str) -> str:
    """GBNF, which has `::=`, as Lark."""
    try:
        converted: str = any_to_lark(text)
    except Exception as error:  # the converter's errors have no class in common
        raise ValueError(str(error)) from error
    return converted
