"""The plot of an engine benchmark, from the rows of its JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

Row = dict[str, Any]

FILE = "engine.png"
_DPI = 130
_LATENCIES = {"time_to_first_token": "time to first token", "inter_token_latency": "between tokens"}
_RATES = {"prefill_tokens_per_s": "prefill", "decode_tokens_per_s": "decode"}


def save_plot(rows: Sequence[Row], directory: Path) -> Path:
    """Write the figure there; returns its path."""
    path = directory / FILE
    figure = draw(rows)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI)
    return path


def draw(rows: Sequence[Row]) -> Figure:
    """Rates above, latencies below, over the batch size; a line for each prompt and output length."""
    figure = Figure(figsize=(10.5, 7.5), layout="constrained")
    rates, latencies = figure.subplots(2, 2)
    for axis, (name, title) in zip(rates, _RATES.items(), strict=True):
        _set_up(axis, rows, title, "tokens/s")
        for number, (label, line) in enumerate(_lines(rows, name).items()):
            axis.plot(_batches(line), [row[name] for row in line], "o-", color=f"C{number}", label=label)
    for axis, (name, title) in zip(latencies, _LATENCIES.items(), strict=True):
        _set_up(axis, rows, title, "ms, median (band: p10 to p90)")
        for number, (label, line) in enumerate(_lines(rows, name).items()):
            _draw_spread(axis, line, name, f"C{number}", label)
    handles, labels = rates[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, title="prompt + output tokens")
    return figure


def _draw_spread(axis: Axes, line: Sequence[Row], name: str, color: str, label: str) -> None:
    def milliseconds(part: str) -> list[float]:
        return [row[name][part] * 1e3 for row in line]

    axis.plot(_batches(line), milliseconds("median"), "o-", color=color, label=label)
    axis.fill_between(_batches(line), milliseconds("p10"), milliseconds("p90"), color=color, alpha=0.2)


def _set_up(axis: Axes, rows: Sequence[Row], title: str, unit: str) -> None:
    axis.set_title(title)
    axis.set_ylabel(unit)
    axis.set_xlabel("requests at once")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({row["case"]["batch"] for row in rows})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _lines(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    """The rows that have a value, by lengths, in order of batch size."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["case"]["batch"]):
        if row[name] is not None:
            case = row["case"]
            lines[f"{case['prompt_length']:,} + {case['output_length']:,}"].append(row)
    return lines


def _batches(line: Sequence[Row]) -> list[int]:
    return [row["case"]["batch"] for row in line]
