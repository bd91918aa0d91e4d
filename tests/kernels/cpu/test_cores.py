from __future__ import annotations

import os
from pathlib import Path

import pytest

from nybble.kernels.cpu.cores import (
    available_cores,
    cpu_quota,
    default_num_threads,
    physical_core,
    siblings_last,
)


def write_topology(folder: Path, siblings: dict[int, str]) -> None:
    for core, text in siblings.items():
        topology = folder / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text + "\n")


def test_siblings_that_are_neighbours(tmp_path: Path) -> None:
    write_topology(tmp_path, {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"})
    assert siblings_last([0, 1, 2, 3], tmp_path) == [0, 2, 1, 3]
    assert siblings_last([1, 2, 3], tmp_path) == [1, 2, 3]


def test_siblings_that_are_far_apart(tmp_path: Path) -> None:
    write_topology(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert siblings_last([0, 1, 2, 3], tmp_path) == [0, 1, 2, 3]
    assert siblings_last([0, 2, 3], tmp_path) == [0, 3, 2]


def test_without_topology_each_core_is_its_own(tmp_path: Path) -> None:
    assert siblings_last([3, 5], tmp_path) == [3, 5]
    assert physical_core(3, tmp_path) != physical_core(5, tmp_path)


@pytest.mark.parametrize(("text", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)])
def test_quota(tmp_path: Path, text: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == cores


@pytest.mark.parametrize("text", ["max 100000", None])
def test_no_quota(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == os.cpu_count()


def test_of_this_process() -> None:
    assert sorted(available_cores()) == sorted(os.sched_getaffinity(0))
    assert 1 <= default_num_threads() <= len(available_cores())
