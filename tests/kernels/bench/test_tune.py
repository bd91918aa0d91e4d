"""Which launch configurations are tried, and which one wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from bench_shapes import TINY
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.bench.cases import BenchCase
from nybble.kernels.bench.inputs import BenchInputs
from nybble.kernels.bench.timing import Run
from nybble.kernels.bench.tunable import Tunable, tunables
from nybble.kernels.bench.tune import (
    MOST_CANDIDATES,
    candidates,
    launches_of,
    tune,
    tuning_lines,
)
from nybble.kernels.triton.launch_choice import TUNABLE_OPS
from nybble.kernels.triton.launch_table import LaunchKey


@dataclass(frozen=True)
class SomeLaunch:
    block_rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SplitLaunch:
    block_rows: int
    splits: int
    num_warps: int
    num_stages: int


DEFAULT = SomeLaunch(32, 4, 3)


class StopwatchOfLaunches:
    """Takes the time that `cost` gives the launch which a run used."""

    def __init__(self, cost: Callable[[Any], float], log: list[Any]) -> None:
        self._cost = cost
        self._log = log
        self._time = 0.0

    def load(self, run: Run) -> str:
        run()
        self._time = self._cost(self._log[-1])
        return "fake"

    def times(self, count: int) -> list[float]:
        return [self._time * (1 + 0.001 * i) for i in range(count)]


def some_tunable(log: list[Any], result: Callable[[Any], Tensor] = lambda launch: torch.ones(4)) -> Tunable:
    def run(launch: Any) -> Tensor:
        log.append(launch)
        return result(launch)

    return Tunable("matmul", "nvfp4", {"rows": 64}, DEFAULT, run)


def test_neighbours_differ_in_one_field() -> None:
    found = candidates(DEFAULT)
    assert found[0] == DEFAULT and len(found) == len(set(found)) <= MOST_CANDIDATES
    for other in found[1:]:
        assert sum(getattr(other, f.name) != getattr(DEFAULT, f.name) for f in fields(DEFAULT)) == 1


def test_splits_are_warps() -> None:
    assert {launch.num_warps for launch in candidates(SplitLaunch(32, 4, 4, 3))} == {4}
    assert {launch.num_warps for launch in candidates(SplitLaunch(128, 1, 4, 3))} == {4, 8}


def test_nothing_senseless() -> None:
    found = candidates(SomeLaunch(16, 4, 1))
    assert all(launch.block_rows >= 16 and launch.num_stages >= 1 for launch in found)


def test_the_fastest_wins() -> None:
    log: list[Any] = []
    tuned = tune(some_tunable(log), StopwatchOfLaunches(lambda launch: 10.0 * launch.block_rows, log))
    assert tuned.best.launch.block_rows == 16 and tuned.overrides == {"block_rows": 16}
    key = LaunchKey.of("matmul", 90, "nvfp4", {"rows": 64})
    assert launches_of([tuned], 90) == {key: {"block_rows": 16}}
    lines = list(tuning_lines(tuned))
    assert lines[0] == "matmul nvfp4, rows 64" and len(lines) == 1 + len(tuned.trials)
    assert [line for line in lines if line.endswith("<- best")] == [
        line for line in lines if "block_rows=16" in line
    ]


def test_within_the_noise_the_default_stays() -> None:
    log: list[Any] = []
    stopwatch = StopwatchOfLaunches(lambda launch: 10.0 - 0.001 * launch.num_stages, log)
    tuned = tune(some_tunable(log), stopwatch)
    assert tuned.best.launch == DEFAULT and not launches_of([tuned], 90)


def test_a_wrong_one_does_not_win() -> None:
    log: list[Any] = []
    wrong = some_tunable(log, lambda launch: torch.full((4,), 1.0 + (launch.block_rows == 16)))
    tuned = tune(wrong, StopwatchOfLaunches(lambda launch: 10.0 * launch.block_rows, log))
    assert tuned.best.launch == DEFAULT
    assert any("cannot be used" in line and "block_rows=16" in line for line in tuning_lines(tuned))


def test_one_that_cannot_be_compiled_does_not_win() -> None:
    log: list[Any] = []

    def result(launch: Any) -> Tensor:
        if launch.num_stages == 4:
            raise RuntimeError("out of resource: shared memory")
        return torch.ones(4)

    tuned = tune(some_tunable(log, result), StopwatchOfLaunches(lambda launch: 10.0 / launch.num_stages, log))
    assert tuned.best.launch == DEFAULT


@pytest.mark.parametrize(
    ("case", "ops"),
    [
        (BenchCase("experts", 1, 2, "nvfp4", "uniform"), ["expert_gate_up", "expert_down"]),
        (BenchCase("experts", 1, 9, "mxfp4", "uniform"), ["grouped_gate_up", "grouped_down"]),
        (BenchCase("qkv", 1, 3, "nvfp4"), ["fp4_linear"]),
        (BenchCase("qkv", 1, 3, "fp8"), ["fp8_linear"]),
        (BenchCase("head", 1, 3, "bf16"), []),
        (BenchCase("norm", 1, 3, "bf16"), []),
    ],
    ids=lambda value: value.name if isinstance(value, BenchCase) else "",
)
def test_what_can_be_tuned(case: BenchCase, ops: list[str]) -> None:
    found = list(tunables(case, TINY, BenchInputs(DEVICE, ARCHES[0])))
    assert [tunable.op for tunable in found] == ops
    for tunable in found:
        assert isinstance(tunable.default, TUNABLE_OPS[tunable.op])
        assert tunable.run(tunable.default).isfinite().all()
