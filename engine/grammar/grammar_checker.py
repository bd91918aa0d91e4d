"""Whether grammars that clients have sent can be compiled, before the engine sees them.

They are compiled in a process of their own, which is ended when one takes too long, and started again for
the next.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from contextlib import suppress

import msgspec

from nybble.engine.errors import InvalidRequestError
from nybble.engine.grammar.grammar import Grammar

_START_TIMEOUT = 120.0  # seconds until a process has read the tokenizer
_NUM_KEPT = 256  # grammars that were right
_TRIVIAL = Grammar(kind="regex", text="a")


class GrammarChecker:
    def __init__(self, checkpoint: str, timeout: float = 3.0) -> None:
        """`timeout`: seconds for one grammar."""
        self._checkpoint = checkpoint
        self._timeout = timeout
        self._process: Process | None = None
        self._lock = asyncio.Lock()  # one grammar at a time
        self._right: OrderedDict[Grammar, None] = OrderedDict()

    async def check(self, grammar: Grammar) -> None:
        """Raises InvalidRequestError: it is malformed, or takes too long or too much memory."""
        if grammar in self._right:
            self._right.move_to_end(grammar)
            return
        async with self._lock:
            problem = await self._ask(grammar)
        if problem is not None:
            raise InvalidRequestError(problem, grammar.parameter)
        self._right[grammar] = None
        if len(self._right) > _NUM_KEPT:
            self._right.popitem(last=False)

    async def stop(self) -> None:
        """End the process, if there is one. The next check starts another."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def _ask(self, grammar: Grammar) -> str | None:
        process = self._process or await self._start()
        try:
            return await asyncio.wait_for(_exchange(process, grammar), self._timeout)
        except TimeoutError:
            await self.stop()
            return f"{grammar.parameter}: takes more than {self._timeout:g} s to compile"
        except EOFError:
            await self.stop()
            return f"{grammar.parameter}: takes too much memory to compile"
        except BaseException:  # its answer would be taken for the next one's
            await self.stop()
            raise

    async def _start(self) -> Process:
        command = [sys.executable, "-m", "nybble.engine.grammar.grammar_process", self._checkpoint]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, limit=1 << 20, start_new_session=True
        )
        self._process = process
        try:
            await asyncio.wait_for(_exchange(process, _TRIVIAL), _START_TIMEOUT)
        except BaseException:
            await self.stop()
            raise
        return process


async def _exchange(process: Process, grammar: Grammar) -> str | None:
    """Raises EOFError: the process has ended."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process has no pipes")
    with suppress(ConnectionError):
        process.stdin.write(msgspec.json.encode(grammar) + b"\n")
        await process.stdin.drain()
    line = await process.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return msgspec.json.decode(line, type=str | None)
