"""Choosing launch configurations by measurement: `nybble bench ops --tune`.

Around the configuration that the code would choose, a few neighbours are tried at each shape. One takes its
place if it computes the same and is faster by more than the noise of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from nybble.kernels.bench.correctness import ROUNDED_ONCE, deviation, poisoned_memory
from nybble.kernels.bench.timing import Stopwatch, Timing, measure
from nybble.kernels.bench.tunable import Tunable
from nybble.kernels.triton.launch_table import LaunchKey

MOST_CANDIDATES = 6
_FEWEST_ROWS = 16
# Fields of launch dataclasses and what they are tried at, by a factor or a step.
_FACTORS = (("block_rows", 2.0), ("block_rows", 0.5), ("num_warps", 2.0))
_STEPS = (("num_stages", 1), ("num_stages", -1))


@dataclass(frozen=True)
class Trial:
    """timing: None if this configuration cannot be compiled or computes something else."""

    launch: Any
    timing: Timing | None


@dataclass(frozen=True)
class Tuned:
    """trials: the first is the default's."""

    tunable: Tunable
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The default, unless another is faster beyond the noise."""
        default = self.trials[0]
        timed = [trial for trial in self.trials if trial.timing is not None]
        fastest = min(timed, key=lambda trial: _median(trial), default=default)
        return fastest if default.timing is None or _is_clearly_faster(fastest, default) else default

    @property
    def overrides(self) -> Mapping[str, int | bool]:
        """Fields in which the best differs from the default."""
        default, best = self.trials[0].launch, self.best.launch
        names = (field.name for field in fields(default))
        return {name: getattr(best, name) for name in names if getattr(best, name) != getattr(default, name)}


def candidates(default: Any) -> list[Any]:
    """The default first, then what differs from it in one field. A number of splits is of warps, and
    stays."""
    names = {field.name for field in fields(default)}
    fixed = {"num_warps"} if "splits" in names and getattr(default, "splits", 1) > 1 else set()
    found = [default]
    for name, factor in _FACTORS:
        if name in names - fixed:
            found.append(replace(default, **{name: int(getattr(default, name) * factor)}))
    for name, step in _STEPS:
        if name in names:
            found.append(replace(default, **{name: getattr(default, name) + step}))
    return [launch for launch in found if _is_sensible(launch)][:MOST_CANDIDATES]


def tune(tunable: Tunable, stopwatch: Stopwatch) -> Tuned:
    """Results of all configurations are compared with the default's, which the benchmark checks."""
    expected = _result(tunable, tunable.default)
    trials = (_trial(tunable, launch, expected, stopwatch) for launch in candidates(tunable.default))
    return Tuned(tunable, tuple(trials))


def launches_of(tuned: Iterable[Tuned], arch: int) -> dict[LaunchKey, Mapping[str, int | bool]]:
    """Entries of a launch table: only where there is something better than the default."""
    return {
        LaunchKey.of(one.tunable.op, arch, one.tunable.format, one.tunable.shape): one.overrides
        for one in tuned
        if one.overrides
    }


def tuning_lines(tuned: Tuned) -> Iterator[str]:
    shape = ", ".join(f"{name} {number}" for name, number in tuned.tunable.shape.items())
    yield f"{tuned.tunable.op} {tuned.tunable.format}, {shape}"
    for trial in tuned.trials:
        time = "cannot be used" if trial.timing is None else f"{trial.timing.median:.1f} us"
        yield f"    {time:>16}  {trial.launch}{'  <- best' if trial is tuned.best else ''}"


def _trial(tunable: Tunable, launch: Any, expected: Tensor, stopwatch: Stopwatch) -> Trial:
    try:
        found = _result(tunable, launch)
        if not ROUNDED_ONCE.admits(deviation(found, expected)):
            return Trial(launch, None)
        return Trial(launch, measure(stopwatch, partial(tunable.run, launch), quick=True))
    except Exception:  # a candidate may want more registers or shared memory than there are
        return Trial(launch, None)


def _result(tunable: Tunable, launch: Any) -> Tensor:
    with poisoned_memory():
        return tunable.run(launch)


def _median(trial: Trial) -> float:
    assert trial.timing is not None
    return trial.timing.median


def _is_clearly_faster(trial: Trial, default: Trial) -> bool:
    assert trial.timing is not None and default.timing is not None
    return trial.timing.p90 < default.timing.p10


def _is_sensible(launch: Any) -> bool:
    return getattr(launch, "block_rows", _FEWEST_ROWS) >= _FEWEST_ROWS and launch.num_stages >= 1
