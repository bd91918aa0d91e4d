"""Whether grammars that clients have sent can be compiled, before the engine sees them.

They are compiled in processes of their own. One that takes too long is ended with its process, and the next
grammar gets a new one. There are two, so that a slow grammar leaves a way for others.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from contextlib import suppress
from hashlib import sha256

import msgspec

from nybble.engine.grammar.grammar import Fault, Grammar

_START_TIMEOUT = 120.0  # seconds until a process has read the tokenizer
_NUM_PROCESSES = 2
_NUM_KEPT = 256  # grammars that were right
_TRIVIAL = Grammar(kind="regex", text="a")


class GrammarChecker:
    def __init__(self, checkpoint: str, timeout: float = 3.0) -> None:
        """`timeout`: seconds for one grammar, from when a process begins with it."""
        self._compilers = [_Compiler(checkpoint, timeout) for _ in range(_NUM_PROCESSES)]
        self._free = [*self._compilers]
        self._some_free = asyncio.Semaphore(_NUM_PROCESSES)
        self._right: OrderedDict[bytes, None] = OrderedDict()  # by digest: a grammar may be long

    async def check(self, grammar: Grammar) -> None:
        """Raises InvalidRequestError: it is malformed, or takes too long or too much memory."""
        digest = sha256(msgspec.msgpack.encode(grammar)).digest()
        if digest in self._right:
            self._right.move_to_end(digest)
            return
        async with self._some_free:
            compiler = self._free.pop()
            try:
                fault = await compiler.fault_of(grammar)
            finally:
                self._free.append(compiler)  # taken first next time: the other starts when both are needed
        if fault is not None:
            raise fault.error()
        self._right[digest] = None
        if len(self._right) > _NUM_KEPT:
            self._right.popitem(last=False)

    async def stop(self) -> None:
        """End the processes, if there are any. The next check starts another."""
        for compiler in self._compilers:
            await compiler.stop()


class _Compiler:
    """A process that compiles one grammar at a time, started when it is needed."""

    def __init__(self, checkpoint: str, timeout: float) -> None:
        self._checkpoint = checkpoint
        self.timeout = timeout
        self.process: Process | None = None

    async def fault_of(self, grammar: Grammar) -> Fault | None:
        process = self.process or await self._start()
        try:
            return await asyncio.wait_for(_exchange(process, grammar), self.timeout)
        except TimeoutError:
            await self.stop()
            text = f"takes more than {self.timeout:g} s to compile"
        except EOFError:
            await self.stop()
            text = "takes too much memory to compile"
        except BaseException:  # its answer would be taken for the next one's
            await self.stop()
            raise
        return Fault(grammar.parameter, text)

    async def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def _start(self) -> Process:
        command = [sys.executable, "-m", "nybble.engine.grammar.grammar_process", self._checkpoint]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, limit=1 << 20, start_new_session=True
        )
        self.process = process
        try:
            await asyncio.wait_for(_exchange(process, _TRIVIAL), _START_TIMEOUT)
        except BaseException:
            await self.stop()
            raise
        return process


async def _exchange(process: Process, grammar: Grammar) -> Fault | None:
    """Raises EOFError: the process has ended."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process has no pipes")
    with suppress(ConnectionError):
        process.stdin.write(msgspec.json.encode(grammar) + b"\n")
        await process.stdin.drain()
    line = await process.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return msgspec.json.decode(line, type=Fault | None)
