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


class Grammar(Struct, frozen=True, kw_only=True):
    """The form that an answer must have.

    kind: what `text` is, a JSON schema, a regular expression (Rust's, of the whole answer) or a grammar in
    GBNF or llguidance's variant of Lark; is_lenient: what cannot be checked of a schema is not refused.
    after_token_id: the form is that of what follows this token, such as the end of a thought.
    parameter: the request's field, for errors.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    is_lenient: bool = False
    after_token_id: int | None = None
    parameter: str = "grammar"
