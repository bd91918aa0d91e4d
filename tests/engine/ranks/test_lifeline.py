"""A rank that is killed while all are idle takes the others along."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from processes import DEADLINE
from ranks import RankProcess, exit_codes, rank_processes
from running import tiny_config
from tiny_glm import make_checkpoint

from nybble.engine.engine_config import ParallelConfig

LIMIT = 2.0  # seconds until the others have ended


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("glm")
    make_checkpoint(directory)
    return directory


@contextmanager
def idle_ranks(checkpoint: Path, logs: Path) -> Iterator[list[RankProcess]]:
    config = replace(tiny_config(checkpoint), parallel=ParallelConfig(pipeline_parallel_size=3))
    argument = msgspec.json.encode(config).decode()
    with rank_processes("rank_start.py", [[argument]] * 3, logs) as ranks:
        for rank in ranks:
            assert rank.process.stdout is not None
            assert rank.process.stdout.readline().startswith("started")
        yield ranks


@pytest.mark.parametrize("victim", [0, 2])
def test_the_others_end_with_a_killed_rank(checkpoint: Path, tmp_path: Path, victim: int) -> None:
    with idle_ranks(checkpoint, tmp_path) as ranks:
        ranks[victim].process.kill()
        codes = exit_codes(ranks, LIMIT)
        assert codes.pop(victim) == -signal.SIGKILL
        assert codes == [1, 1]
        others = [rank for rank in ranks if rank is not ranks[victim]]
        assert [len(rank.log.read_text().splitlines()) for rank in others] == [1, 1]  # which one is gone


def test_an_end_in_order_is_no_failure(checkpoint: Path, tmp_path: Path) -> None:
    with idle_ranks(checkpoint, tmp_path) as ranks:
        assert ranks[0].process.stdin is not None
        ranks[0].process.stdin.close()
        assert exit_codes(ranks, DEADLINE) == [0, 0, 0]
        assert [rank.log.read_text() for rank in ranks] == ["", "", ""]
