"""The plot of a serving benchmark, from the rows of its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

Row = dict[str, Any]

FILE = "serving.png"
_DPI = 130
_TIMES = {
    "ttft": "TTFT: to the first chunk",
    "tpot": "TPOT: a token after the first",
    "itl": "ITL: between chunks",
    "e2e": "E2E: the whole request",
}
_PARTS = {"median": "-", "p90": "--", "p99": ":"}


def save_plot(rows: Sequence[Row], directory: Path) -> Path:
    """Write the figure there; returns its path."""
    path = directory / FILE
    figure = draw(rows)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI)
    return path


def draw(rows: Sequence[Row]) -> Figure:
    """Throughput, goodput and times over the load, which all rows give in the same way."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    rates, requests, *times = figure.subplots(2, 3).ravel()
    by = "rate" if rows[0]["load"]["concurrency"] is None else "concurrency"
    rows = sorted(rows, key=lambda row: float(row["load"][by]))
    for axis in (rates, requests, *times):
        _set_up(axis, by, [float(row["load"][by]) for row in rows])
    _draw_rates(rates, "tokens/s", rows, by, {"output_tokens_per_s": "output", "total_tokens_per_s": "all"})
    _draw_rates(requests, "requests/s", rows, by, {"requests_per_s": "answered", "goodput": "goodput"})
    for axis, (name, title) in zip(times, _TIMES.items(), strict=True):
        _draw_times(axis, title, rows, by, name)
    return figure


def _draw_rates(axis: Axes, title: str, rows: Sequence[Row], by: str, names: dict[str, str]) -> None:
    axis.set_title(title)
    for name, label in names.items():
        axis.plot(
            [row["load"][by] for row in rows], [row["metrics"][name] for row in rows], "o-", label=label
        )
    axis.set_ylim(bottom=0)
    axis.legend()


def _draw_times(axis: Axes, title: str, rows: Sequence[Row], by: str, name: str) -> None:
    axis.set_title(title)
    axis.set_ylabel("ms")
    shown = [row for row in rows if row["metrics"][name] is not None]
    for part, style in _PARTS.items():
        values = [row["metrics"][name][part] * 1e3 for row in shown]
        axis.plot([row["load"][by] for row in shown], values, f"o{style}", color="C0", label=part)
    axis.set_ylim(bottom=0)
    axis.legend()


def _set_up(axis: Axes, by: str, ticks: Sequence[float]) -> None:
    axis.set_xlabel("requests at once" if by == "concurrency" else "requests a second")
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axis.grid(alpha=0.3)
