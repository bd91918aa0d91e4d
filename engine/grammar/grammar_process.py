"""Compiles grammars that clients have sent, in a process that may take too long or die of one.

`python -m nybble.engine.grammar.grammar_process DIRECTORY`: for each line of standard input, a `Grammar` in
JSON, a line of output: null, or in JSON what is wrong with it. Imports neither torch nor transformers.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import msgspec

from nybble.engine.errors import InvalidRequestError
from nybble.engine.grammar.grammar import Grammar
from nybble.engine.grammar.grammar_compiler import GrammarCompiler

_MAX_MEMORY = 2 << 30  # bytes of its own; beyond that the process dies of a grammar


def main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_MEMORY, _MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiler = GrammarCompiler(Path(sys.argv[1]))
    for line in sys.stdin.buffer:
        grammar = msgspec.json.decode(line, type=Grammar)
        print(msgspec.json.encode(_problem(compiler, grammar)).decode(), flush=True)


def _problem(compiler: GrammarCompiler, grammar: Grammar) -> str | None:
    try:
        compiler.start(grammar, stop_token_ids=(0,))
    except InvalidRequestError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
