"""Plots of kernel benchmark results, from the rows of their JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = dict[str, Any]
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

OURS = "nybble"
_DPI = 130
_MOST_BARS = 80
_SIZES = {"attention": "batch", "prefill_attention": "chunk"}
_DARK_BELOW, _DARK_ABOVE = 0.12, 0.88  # where the heat map's colours are too dark for black


def save_plots(rows: Sequence[Row], directory: Path) -> Iterator[Path]:
    """The files as they are written: times of each op, fractions of the roof, ratios to peers."""
    ours = [row for row in rows if row["backend"] == OURS]
    for op, members in _grouped(ours, lambda row: row["case"]["op"]).items():
        if len({_x(row) for row in members}) > 1:
            yield _save(_times(op, members), directory / f"time-{op}.png")
    if ours:
        yield _save(_roof_fractions(ours), directory / "roof-fraction.png")
    for op, ratios in _grouped(_ratios(rows), lambda ratio: ratio.op).items():
        yield _save(_peer_ratios(ratios), directory / f"peers-{op}.png")


def _times(op: str, rows: Sequence[Row]) -> Figure:
    """Time over tokens or context, a panel for each tensor-parallel size, the roof dashed."""
    panels = _grouped(rows, lambda row: row["case"]["tp"])
    figure = Figure(figsize=(5.2 * len(panels) + 0.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (tp, members) in zip(axes, panels.items(), strict=True):
        _draw_times(axis, members)
        axis.set_title(f"{op}, tp {tp}")
    axes[0].set_ylabel(_time_label(rows))
    lines = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        lines.values(), lines, loc="outside right center", fontsize=8, title="dashed: roof", title_fontsize=8
    )
    return figure


def _draw_times(axis: Axes, rows: Sequence[Row]) -> None:
    for number, (label, members) in enumerate(_grouped(rows, _series).items()):
        line = sorted(members, key=_x)
        places, color = [_x(row) for row in line], f"C{number}"
        axis.plot(places, [row["median_us"] for row in line], "o-", color=color, label=label, markersize=3.5)
        low, high = [row["p10_us"] for row in line], [row["p90_us"] for row in line]
        axis.fill_between(places, low, high, color=color, alpha=0.2)
        axis.plot(places, [row["roof_us"] for row in line], "--", color=color, linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({_x(row) for row in rows})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8, rotation=45)
    axis.minorticks_off()
    axis.set_xlabel(_x_label(rows[0]))
    axis.grid(alpha=0.3)


def _roof_fractions(rows: Sequence[Row]) -> Figure:
    """A heat map, a line for each kind of case; those of attention have columns of their own."""
    tables = _grouped(rows, _x_label)
    heights = [len(_grouped(members, _line)) for members in tables.values()]
    widths = [len({_x(row) for row in members}) for members in tables.values()]
    size = (3.2 + 0.62 * max(widths), 1.2 + 0.26 * sum(heights) + 0.9 * len(heights))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, members in zip(grid, tables.values(), strict=True):
        _draw_fractions(axis, members)
    is_modelled = any(row["kind"] == "modelled" for row in rows)
    figure.suptitle("Fraction of the roof" + (" (modelled)" if is_modelled else ""), fontsize=11)
    return figure


def _draw_fractions(axis: Axes, rows: Sequence[Row]) -> None:
    lines = _grouped(rows, _line)
    columns = sorted({_x(row) for row in rows})
    fractions = {(_line(row), _x(row)): row["roof_fraction"] for row in rows}
    table = [[fractions.get((line, column), float("nan")) for column in columns] for line in lines]
    axis.imshow(table, cmap=colormaps["RdYlGn"], vmin=0, vmax=1, aspect="auto")
    for (line, column), fraction in fractions.items():
        place = columns.index(column), list(lines).index(line)
        color = "black" if _DARK_BELOW < fraction < _DARK_ABOVE else "white"
        axis.text(*place, f"{fraction:.0%}", ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(columns)), [f"{column:,}" for column in columns], fontsize=8)
    axis.set_yticks(range(len(lines)), list(lines), fontsize=8)
    axis.set_xlabel(_x_label(rows[0]), fontsize=8)


@dataclass(frozen=True)
class _Ratio:
    """value: the peer's time over ours."""

    op: str
    case: str
    peer: str
    value: float


def _ratios(rows: Sequence[Row]) -> Iterator[_Ratio]:
    ours = {row["name"]: row["median_us"] for row in rows if row["backend"] == OURS}
    for row in rows:
        if row["backend"] != OURS and row["name"] in ours:
            value = row["median_us"] / ours[row["name"]]
            yield _Ratio(row["case"]["op"], row["name"], row["backend"], value)


def _peer_ratios(ratios: Sequence[_Ratio]) -> Figure:
    """Bars to the right of 1 are peers that take longer than our kernels."""
    shown = list(reversed(ratios[:_MOST_BARS]))
    figure = Figure(figsize=(8.5, 1.2 + 0.24 * len(shown)), layout="constrained")
    axis = figure.subplots()
    peers = sorted({ratio.peer for ratio in ratios})
    places = range(len(shown))
    axis.barh(places, [ratio.value for ratio in shown], color=[f"C{peers.index(r.peer)}" for r in shown])
    axis.set_yticks(places, [f"{ratio.case}: {ratio.peer}" for ratio in shown], fontsize=7)
    for place, ratio in zip(places, shown, strict=True):
        axis.text(ratio.value, place, f" {ratio.value:.2f}", va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=1)
    axis.margins(x=0.12, y=0.01)
    more = f" (the first {_MOST_BARS} of {len(ratios)})" if len(ratios) > _MOST_BARS else ""
    axis.set_xlabel(f"time of the peer / time of ours{more}")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI)
    return path


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """In the order in which keys first come up."""
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _x(row: Row) -> int:
    context = row["case"]["context"]
    return int(row["case"]["tokens"] if context is None else context)


def _x_label(row: Row) -> str:
    return "tokens" if row["case"]["context"] is None else "context"


def _series(row: Row) -> str:
    """What tells lines of one panel apart."""
    case = row["case"]
    size = None if case["context"] is None else f"{_SIZES[case['op']]} {case['tokens']}"
    parts = [case["format"], case["routing"], size]
    return ", ".join(part for part in parts if part)


def _line(row: Row) -> str:
    return f"{row['case']['op']} tp {row['case']['tp']}, {_series(row)}"


def _time_label(rows: Sequence[Row]) -> str:
    return "modelled time, us" if rows[0]["kind"] == "modelled" else "median time, us (band: p10 to p90)"
