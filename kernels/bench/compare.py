"""Two results of the kernel benchmark side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nybble.kernels.bench.report import BenchFileError, BenchReport, Row

_LEAST_NOISE = 0.02


@dataclass(frozen=True)
class Change:
    """noise: how far the ratio of times may be from 1 and mean nothing."""

    before: Row
    after: Row
    noise: float

    @property
    def ratio(self) -> float:
        return self.after.median_us / self.before.median_us

    @property
    def is_regression(self) -> bool:
        return self.ratio > 1 + self.noise

    @property
    def is_gain(self) -> bool:
        return self.ratio < 1 / (1 + self.noise)


@dataclass(frozen=True)
class Comparison:
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.is_regression]


def compare_reports(before: BenchReport, after: BenchReport) -> Comparison:
    """Of rows of the same case and backend. Raises BenchFileError if one is measured and the other
    modelled."""
    kinds = {row.kind for report in (before, after) for row in report.rows}
    if len(kinds) > 1:
        raise BenchFileError("one of the results is measured, the other is modelled")
    old, new = _by_key(before), _by_key(after)
    changes = tuple(Change(old[key], new[key], _noise(old[key], new[key])) for key in old if key in new)
    notes = _machine_notes(before, after)
    for words, keys in (("only before", old.keys() - new.keys()), ("only after", new.keys() - old.keys())):
        notes += [f"{words}: {name} ({backend})" for name, backend in sorted(keys)]
    return Comparison(changes, tuple(notes))


def comparison_table(comparison: Comparison) -> str:
    lines = [f"{'before us':>11} {'after us':>11} {'ratio':>7} {'noise':>7}  case"]
    for change in comparison.changes:
        mark = "  SLOWER" if change.is_regression else "  faster" if change.is_gain else ""
        lines.append(
            f"{change.before.median_us:11.1f} {change.after.median_us:11.1f} {change.ratio:7.3f} "
            f"{change.noise:7.3f}  {change.before.case.name} ({change.before.backend}){mark}"
        )
    return "\n".join([*lines, *comparison.notes])


def _by_key(report: BenchReport) -> dict[tuple[str, str], Row]:
    return {(row.case.name, row.backend): row for row in report.rows}


def _noise(before: Row, after: Row) -> float:
    """The halves of both spreads, added."""
    spreads = ((row.p90_us - row.p10_us) / row.median_us / 2 for row in (before, after))
    return max(sum(spreads), _LEAST_NOISE)


def _machine_notes(before: BenchReport, after: BenchReport) -> list[str]:
    names = sorted({*before.machine, *after.machine})
    return list(_differences(before, after, names))


def _differences(before: BenchReport, after: BenchReport, names: list[str]) -> Iterator[str]:
    for name in names:
        old, new = before.machine.get(name), after.machine.get(name)
        if old != new:
            yield f"not the same machine: {name} is {old} before and {new} after"
