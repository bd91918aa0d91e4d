from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from nybble.server.bench.bench_serving_plot import draw, save_plot


def row(load: float, is_rate: bool = False, tpot: bool = True) -> dict[str, Any]:
    names = ("mean", "median", "p90", "p99", "max")
    times = {name: load * number / 1e3 for number, name in enumerate(names, 1)}
    rates = ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s", "goodput")
    metrics: dict[str, Any] = {name: load * number for number, name in enumerate(rates, 1)}
    metrics |= {"ttft": times, "tpot": times if tpot else None, "itl": times, "e2e": times}
    return {
        "load": {"concurrency": None if is_rate else load, "rate": load if is_rate else None},
        "metrics": metrics,
    }


def test_file(tmp_path: Path) -> None:
    path = save_plot([row(1), row(8)], tmp_path)
    assert path == tmp_path / "serving.png" and path.read_bytes().startswith(b"\x89PNG")


def test_lines_over_the_load() -> None:
    rates, requests, ttft, tpot, _, _ = draw([row(8), row(1)]).axes
    assert list(rates.lines[1].get_xdata()) == [1, 8] and list(rates.lines[1].get_ydata()) == [2, 16]
    assert [line.get_label() for line in requests.lines] == ["answered", "goodput"]
    assert list(ttft.lines[2].get_ydata()) == [4, 32] and ttft.get_xlabel() == "requests at once"
    assert [label.get_text() for label in tpot.get_xticklabels()] == ["1", "8"]


def test_over_rates_and_without_values() -> None:
    rates, _, _, tpot, *_ = draw([row(0.5, is_rate=True, tpot=False)]).axes
    assert rates.get_xlabel() == "requests a second" and list(rates.lines[0].get_xdata()) == [0.5]
    assert [list(line.get_xdata()) for line in tpot.lines] == [[], [], []]
