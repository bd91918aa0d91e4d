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
        assert checker._process is not None
        os.kill(checker._process.pid, signal.SIGSTOP)  # as one that never comes to an end
        checker._timeout = 0.1
        with pytest.raises(InvalidRequestError, match=r"takes more than 0\.1 s"):
            await checker.check(Grammar(kind="regex", text="b"))
        checker._timeout = 60
        await checker.check(Grammar(kind="regex", text="c"))
        await checker.stop()

    drive(work())


def test_one_that_ends_the_process_is_refused_and_the_next_is_checked(directory: str) -> None:
    async def work() -> None:
        checker = GrammarChecker(directory, timeout=60)
        await checker.check(GOOD)
        assert checker._process is not None
        os.kill(checker._process.pid, signal.SIGKILL)
        with pytest.raises(InvalidRequestError, match="too much memory"):
            await checker.check(Grammar(kind="regex", text="b"))
        with pytest.raises(InvalidRequestError, match="unclosed"):
            await checker.check(BAD)
        await checker.stop()

    drive(work())
