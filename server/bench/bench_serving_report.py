"""Results of a serving benchmark as tables: of one run, and of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from nybble.engine.errors import OptionError

Row = dict[str, Any]

_WIDTH = 150  # where the output is not a terminal, whose width would be taken
_TIMES = ("ttft", "tpot", "itl", "e2e")
_PARTS = ("mean", "median", "p90", "p99")
_RATES = {
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "all tokens/s",
    "requests_per_s": "requests/s",
    "goodput": "goodput, requests/s",
}


def load_name(load: Row) -> str:
    return f"{load['rate']:g}/s" if load["concurrency"] is None else f"{load['concurrency']} at once"


def print_results(rows: Sequence[Row], out: TextIO) -> None:
    """Rates and counts, times, and every error."""
    console = _console(out)
    console.print(_rates_table(rows))
    console.print(_times_table(rows))
    for row in rows:
        for message, count in row["metrics"]["errors"].items():
            console.print(f"{load_name(row['load'])}: {count} failed: {message}", markup=False)


def print_comparison(first: Row, second: Row, out: TextIO) -> None:
    """What they have measured under the same loads; ratios are second / first.

    Raises:
        OptionError: they have no load in common.
    """
    others = {load_name(row["load"]): row["metrics"] for row in second["rows"]}
    pairs = [
        (load_name(row["load"]), row["metrics"], others[load_name(row["load"])])
        for row in first["rows"]
        if load_name(row["load"]) in others
    ]
    if not pairs:
        raise OptionError("compare: the two results have no load in common")
    console = _console(out)
    for name, document in (("A", first), ("B", second)):
        console.print(f"{name}: {document['options']['url']}, {document['model']}", markup=False)
    for option in sorted(first["options"].keys() | second["options"].keys()):
        a, b = (document["options"].get(option) for document in (first, second))
        if a != b and option not in ("url", "model", "out"):
            console.print(f"not measured alike: {option} is {a} in A and {b} in B", markup=False)
    table = Table(title="B against A; times in ms")
    for name in ("load", "", "A", "B", "B / A"):
        table.add_column(name, justify="left" if name in ("load", "") else "right")
    for load, a, b in pairs:
        for label, path in _compared():
            table.add_row(load, label, *_compared_cells(_value(a, path), _value(b, path)))
            load = ""
        table.add_section()
    console.print(table)


def _rates_table(rows: Sequence[Row]) -> Table:
    table = _table(
        "load", "requests", "failed", *_RATES.values(), "prompt", "output", "tokens/chunk", "cached"
    )
    for row in rows:
        metrics = row["metrics"]
        table.add_row(
            load_name(row["load"]),
            f"{metrics['num_requests']}",
            f"{metrics['num_requests'] - metrics['num_finished']}",
            *(f"{metrics[name]:,.2f}" for name in _RATES),
            _length(metrics["prompt_tokens"]),
            _length(metrics["output_tokens"]),
            f"{metrics['tokens_per_chunk']:.2f}",
            f"{metrics['num_cached_tokens'] / max(metrics['num_prompt_tokens'], 1):.0%}",
        )
    return table


def _times_table(rows: Sequence[Row]) -> Table:
    table = _table("load", "ms", *_PARTS, "max")
    for row in rows:
        load = load_name(row["load"])
        for name in (*_TIMES, "first_byte", "send_delay"):
            found = row["metrics"][name]
            cells = ["" if found is None else f"{found[part] * 1e3:,.2f}" for part in (*_PARTS, "max")]
            table.add_row(load, name.upper() if name in _TIMES else name.replace("_", " "), *cells)
            load = ""
        table.add_section()
    return table


def _length(lengths: Row | None) -> str:
    """Tokens of a request: one number where all have it, else the mean and the most."""
    if lengths is None:
        return ""
    if lengths["mean"] == lengths["max"]:
        return f"{lengths['max']:.0f}"
    return f"{lengths['mean']:.1f} (max {lengths['max']:.0f})"


def _compared() -> list[tuple[str, tuple[str, ...]]]:
    rates = [(label, (name,)) for name, label in _RATES.items()]
    times = [(f"{name.upper()} {part}", (name, part)) for name in _TIMES for part in ("median", "p99")]
    return [*rates, *times, ("failed", ("num_failed",))]


def _value(metrics: Row, path: tuple[str, ...]) -> float | None:
    if path == ("num_failed",):
        return float(metrics["num_requests"] - metrics["num_finished"])
    found: Any = metrics
    for name in path:
        found = None if found is None else found[name]
    return None if found is None else float(found) * (1e3 if len(path) > 1 else 1)


def _compared_cells(a: float | None, b: float | None) -> list[str]:
    ratio = "" if a is None or b is None or not a else f"{b / a:.3f}"
    return [*("" if value is None else f"{value:,.2f}" for value in (a, b)), ratio]


def _table(*names: str) -> Table:
    table = Table()
    for name in names:
        table.add_column(name, justify="left" if name in ("load", "ms") else "right")
    return table


def _console(out: TextIO) -> Console:
    return Console(file=out, width=None if out.isatty() else _WIDTH, highlight=False)
