"""Grammars of clients, compiled in a process that may be lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import write_tokenizer

from nybble.engine.errors import InvalidRequestError
from nybble.engine.grammar.grammar import Grammar
from nybble.engine.grammar.grammar_checker import GrammarChecker

GOOD = Grammar(kind="regex", text="a+")
BAD = Grammar(kind="regex", text="(", parameter="guided_regex")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return str(path)


def drive(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


def test_good_and_bad_ones_in_turn(directory: str) -> None:
    async def work() -> None:
        checker = GrammarChecker(directory, timeout=60)
        for _ in range(2):
            await checker.check(GOOD)
            with pytest.raises(InvalidRequestError, match="unclosed") as caught:
                await checker.check(BAD)
            assert caught.value.parameter == "guided_regex"
        await checker.stop()

    drive(work())


def test_one_that_takes_too_long_is_refused_and_the_next_is_checked(directory: str) -> None:
    async def work() -> None:
        checker = GrammarChecker(directory, timeout=60)
        await checker.check(GOOD)
        assert checker._free[-1].process is not None
        os.kill(checker._free[-1].process.pid, signal.SIGSTOP)  # as one that never comes to an end
        checker._free[-1].timeout = 0.1
        with pytest.raises(InvalidRequestError, match=r"takes more than 0\.1 s"):
            await checker.check(Grammar(kind="regex", text="b"))
        checker._free[-1].timeout = 60
        await checker.check(Grammar(kind="regex", text="c"))
        await checker.stop()

    drive(work())


def test_one_that_ends_the_process_is_refused_and_the_next_is_checked(directory: str) -> None:
    async def work() -> None:
        checker = GrammarChecker(directory, timeout=60)
        await checker.check(GOOD)
        assert checker._free[-1].process is not None
        os.kill(checker._free[-1].process.pid, signal.SIGKILL)
        with pytest.raises(InvalidRequestError, match="too much memory"):
            await checker.check(Grammar(kind="regex", text="b"))
        with pytest.raises(InvalidRequestError, match="unclosed"):
            await checker.check(BAD)
        await checker.stop()

    drive(work())


def test_a_slow_one_leaves_a_way_for_others(directory: str) -> None:
    async def work() -> None:
        checker = GrammarChecker(directory, timeout=60)
        await checker.check(GOOD)
        stopped = checker._free[-1]
        assert stopped.process is not None
        os.kill(stopped.process.pid, signal.SIGSTOP)
        slow = asyncio.create_task(checker.check(Grammar(kind="regex", text="b", parameter="slow")))
        await asyncio.sleep(0)
        for text in "cde":
            await checker.check(Grammar(kind="regex", text=text))
        assert not slow.done()
        os.kill(stopped.process.pid, signal.SIGKILL)
        with pytest.raises(InvalidRequestError, match=r"^slow: "):
            await slow
        await checker.stop()

    drive(work())


def test_the_limit_counts_from_when_a_process_begins(directory: str) -> None:
    async def work() -> None:
        checker = GrammarChecker(directory, timeout=60)
        grammars = [Grammar(kind="regex", text=f"x{number}") for number in range(8)]
        await asyncio.gather(*map(checker.check, grammars))
        for compiler in checker._free:
            assert compiler.process is not None
            os.kill(compiler.process.pid, signal.SIGSTOP)
            compiler.timeout = 0.3
        late = [Grammar(kind="regex", text=f"y{number}") for number in range(3)]
        found = await asyncio.gather(*map(checker.check, late), return_exceptions=True)
        # The third was given a process that the end of one of the first two had freed, a new one.
        assert [type(each) for each in found[:2]] == [InvalidRequestError] * 2
        assert found[2] is None or "0.3 s" in str(found[2])
        await checker.stop()

    drive(work())


def test_the_line_at_fault_is_named(directory: str) -> None:
    async def work() -> None:
        checker = GrammarChecker(directory, timeout=60)
        bad = Grammar(kind="calls", text="start: a\na: /(/", line_parameters=("one", "two"))
        with pytest.raises(InvalidRequestError, match=r"^two: ") as caught:
            await checker.check(bad)
        assert caught.value.parameter == "two"
        await checker.stop()

    drive(work())
