"""Compiles grammars for a checkpoint's tokenizer, with llguidance.

It matches bytes, so how a text is cut into tokens is left to the model. Its end of text is a token that is
added to the vocabulary: `GrammarState` puts the request's stop tokens in its place.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from tokenizers import Tokenizer

from nybble.engine.checkpoint.vocabulary import count_token_ids
from nybble.engine.errors import InvalidRequestError
from nybble.engine.grammar.grammar import Grammar
from nybble.engine.grammar.grammar_state import GrammarState, Numerals, summary

MAX_GRAMMAR_BYTES = 1 << 18
MAX_SPACES = 32  # one after the other between the tokens of JSON: a model can be caught in endless ones

_NUM_KEPT = 64  # grammars that stay compiled
_END = "<|end of grammar|>"

# Of the library's defaults, a fifth of the memory and work that are bounded here.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False
)


class GrammarCompiler:
    """For a checkpoint's tokenizer, read when it is first needed. May be used from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._num_token_ids = 0
        self._numerals: Numerals | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher | str] = OrderedDict()  # or what is wrong with it

    def compile(self, grammar: Grammar) -> None:
        """Compile it, with the mask of its first token, unless it is. `start` says what is wrong with it."""
        self._get(grammar)

    def start(self, grammar: Grammar, stop_token_ids: Sequence[int]) -> GrammarState:
        """For a new answer; stop_token_ids: what may end it.

        Raises:
            InvalidRequestError: the grammar is malformed, allows nothing or exceeds a limit.
        """
        compiled = self._get(grammar)
        if isinstance(compiled, str):
            raise InvalidRequestError(f"{grammar.parameter}: {compiled}", grammar.parameter)
        stops = [token_id for token_id in stop_token_ids if token_id < self._num_token_ids]
        if not stops:
            raise InvalidRequestError(
                f"{grammar.parameter}: the answer must be able to end with a stop token", grammar.parameter
            )
        numerals = self._numerals if grammar.kind == "json_schema" else None
        return GrammarState(
            compiled.deep_copy(), grammar.after_token_id, stops, self._num_token_ids, numerals
        )

    def _get(self, grammar: Grammar) -> LLMatcher | str:
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

    def _compile(self, grammar: Grammar) -> LLMatcher | str:
        if len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
            return f"longer than {MAX_GRAMMAR_BYTES} bytes"
        tokenizer = self._read_tokenizer()
        if tokenizer is None:
            return "the checkpoint has no tokenizer.json"
        try:
            source = _source(grammar)
        except ValueError as error:
            return f"malformed: {str(error)[:300]}"
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
        matcher.compute_bitmask()
        if matcher.is_error() or matcher.is_stopped():
            return summary(matcher.get_error()) or "nothing is allowed by it"
        return matcher

    def _read_tokenizer(self) -> LLTokenizer | None:
        path = self._directory / "tokenizer.json"
        with self._loading:
            if self._tokenizer is None and path.exists():
                self._num_token_ids = count_token_ids(self._directory, 1 << 31)
                tokenizer = Tokenizer.from_file(str(path))
                self._numerals = _numerals(tokenizer)
                tokenizer.add_special_tokens([_END])
                self._tokenizer = LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id(_END))
        return self._tokenizer


def _source(grammar: Grammar) -> str:
    """What the library compiles. Raises ValueError: not JSON, or malformed GBNF."""
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(_as_lark(grammar.text))
    return LLMatcher.grammar_from_json_schema(
        grammar.text,
        overrides={
            "whitespace_flexible": True,
            "whitespace_pattern": rf"[ \n\r\t]{{1,{MAX_SPACES}}}",
            "item_separator": ",",
            "key_separator": ":",
            "coerce_one_of": True,
            "lenient": grammar.is_lenient,
        },
    )


def _numerals(tokenizer: Tokenizer) -> Numerals | None:
    """None for a vocabulary without a letter of its own: numbers cannot be told from strings then."""
    letter = tokenizer.token_to_id("x")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    digits = frozenset(token_id for text, token_id in vocabulary.items() if text.isascii() and text.isdigit())
    return Numerals(digits, letter) if digits and letter is not None else None


def _as_lark(text: str) -> str:
    """GBNF, which has `::=`, as Lark."""
    try:
        converted: str = any_to_lark(text)
    except Exception as error:  # the converter's errors have no class in common
        raise ValueError(str(error)) from error
    return converted
