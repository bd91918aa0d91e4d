"""Plots of benchmark results: which there are, and what stands in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from nybble.server.bench import bench_plots
from nybble.server.bench.bench_plots import save_plots


def row(op: str, tokens: int, us: float = 10.0, backend: str = "nybble", **case: Any) -> dict[str, Any]:
    shape = {"op": op, "tp": 8, "tokens": tokens, "format": "nvfp4", "routing": None, "context": None} | case
    return {
        "case": shape,
        "name": ", ".join(f"{name} {value}" for name, value in shape.items()),
        "backend": backend,
        "kind": "measured",
        "median_us": us,
        "p10_us": us * 0.9,
        "p90_us": us * 1.2,
        "roof_us": us / 2,
        "roof_fraction": 0.5,
    }


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """What would be saved, by the name of the file."""
    found: dict[str, Figure] = {}

    def save(figure: Figure, path: Path) -> Path:
        found[path.name] = figure
        return path

    monkeypatch.setattr(bench_plots, "_save", save)
    return found


def test_files(tmp_path: Path) -> None:
    rows = [row("experts", 1), row("experts", 8), row("experts", 8, backend="vllm marlin"), row("norm", 1)]
    paths = list(save_plots(rows, tmp_path))
    assert [path.name for path in paths] == ["time-experts.png", "roof-fraction.png", "peers-experts.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_time_over_tokens_with_the_roof(figures: dict[str, Figure]) -> None:
    rows = [row("experts", tokens, us, tp=tp) for tp in (1, 8) for tokens, us in ((8, 20.0), (1, 10.0))]
    list(save_plots(rows, Path()))
    first, second = figures["time-experts.png"].axes
    assert (first.get_title(), second.get_title()) == ("experts, tp 1", "experts, tp 8")
    times, roof = first.lines
    assert list(times.get_xdata()) == [1, 8] and list(times.get_ydata()) == [10.0, 20.0]
    assert list(roof.get_ydata()) == [5.0, 10.0] and roof.get_linestyle() == "--"
    assert first.get_ylabel() == "median time, us (band: p10 to p90)"


def test_attention_over_context(figures: dict[str, Figure]) -> None:
    list(save_plots([row("attention", 8, context=context) for context in (1024, 8192)], Path()))
    (axis,) = figures["time-attention.png"].axes
    assert axis.get_xlabel() == "context" and axis.lines[0].get_label() == "nvfp4, batch 8"


def test_modelled_plots_say_so(figures: dict[str, Figure]) -> None:
    rows = [row("experts", tokens) | {"kind": "modelled"} for tokens in (1, 2)]
    list(save_plots(rows, Path()))
    assert figures["time-experts.png"].axes[0].get_ylabel() == "modelled time, us"
    assert figures["roof-fraction.png"].get_suptitle() == "Fraction of the roof (modelled)"


def test_the_heat_map_has_a_line_for_each_kind_of_case(figures: dict[str, Figure]) -> None:
    rows = [row("experts", 1), row("experts", 8), row("qkv", 8), row("attention", 8, context=1024)]
    list(save_plots(rows, Path()))
    by_tokens, by_context = figures["roof-fraction.png"].axes
    assert [label.get_text() for label in by_tokens.get_yticklabels()] == [
        "experts tp 8, nvfp4",
        "qkv tp 8, nvfp4",
    ]
    assert [label.get_text() for label in by_tokens.get_xticklabels()] == ["1", "8"]
    assert [text.get_text() for text in by_tokens.texts] == ["50%"] * 3
    assert [label.get_text() for label in by_context.get_xticklabels()] == ["1,024"]


def test_a_peer_that_takes_twice_as_long_has_a_bar_of_two(figures: dict[str, Figure]) -> None:
    list(save_plots([row("experts", 1), row("experts", 1, 20.0, "vllm marlin")], Path()))
    (axis,) = figures["peers-experts.png"].axes
    (bar,) = axis.patches
    assert bar.get_width() == pytest.approx(2.0)  # type: ignore[attr-defined]
    assert axis.get_yticklabels()[0].get_text().endswith(": vllm marlin")
