"""Compiles grammars that clients have sent, in a process that may take too long or die of one.

`python -m nybble.engine.grammar.grammar_process DIRECTORY`: for each line of standard input, a `Grammar` in
JSON, a line of output: null, or a `Fault` in JSON. Imports neither torch nor transformers.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import msgspec

from nybble.engine.grammar.grammar import Grammar
from nybble.engine.grammar.grammar_compiler import GrammarCompiler

_MAX_MEMORY = 2 << 30  # bytes of its own; beyond that the process dies of a grammar


def main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_MEMORY, _MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiler = GrammarCompiler(Path(sys.argv[1]))
    for line in sys.stdin.buffer:
        grammar = msgspec.json.decode(line, type=Grammar)
        print(msgspec.json.encode(compiler.fault(grammar)).decode(), flush=True)


if __name__ == "__main__":
    main()
