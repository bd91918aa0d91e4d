"""What a request says of the form of its answer, as text.

Grammar          the text (here)
GrammarChecker   whether it can be compiled in time, in a process that may die of it (server's side)
GrammarQueue     holds its request back until it is compiled, beside the engine's loop
GrammarCompiler  makes it a matcher, within limits
GrammarState     follows one answer, and says which tokens may be next
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from nybble.engine.errors import InvalidRequestError

MAX_GRAMMAR_BYTES = 1 << 18
MAX_CALLS_BYTES = 1 << 20  # of a grammar of tool calls, which is written here


class Thought(Struct, frozen=True, kw_only=True):
    """What comes before the part of an answer that has a form, up to the token `end_token_id`.

    start_token_id: where the model opens the thought, which it may leave out, after white space at most; None
    where the prompt has opened it.
    """

    end_token_id: int
    start_token_id: int | None = None


class Grammar(Struct, frozen=True, kw_only=True):
    """The form that an answer must have, after its thought.

    kind: what `text` is, a JSON schema, a regular expression (Rust's, of the whole answer), a grammar in GBNF
    or llguidance's variant of Lark, or one of tool calls: Lark that has `@content` for the grammar `content`.
    is_lenient: what cannot be checked of a schema is not refused.
    reserved_token_ids: tokens whose text nothing but they may make, in the thought neither they.
    parameter: the request's field, for errors; line_parameters: that of each line of `text`, where they
    differ.
    """

    kind: Literal["json_schema", "regex", "lark", "calls"]
    text: str
    is_lenient: bool = False
    thought: Thought | None = None
    content: Grammar | None = None
    reserved_token_ids: tuple[int, ...] = ()
    parameter: str = "grammar"
    line_parameters: tuple[str, ...] = ()


class Fault(Struct, frozen=True):
    """What is wrong with a grammar, and the request's field that it is in."""

    parameter: str
    text: str

    def error(self) -> InvalidRequestError:
        return InvalidRequestError(f"{self.parameter}: {self.text}", self.parameter)
