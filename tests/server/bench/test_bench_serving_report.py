from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

import pytest

from nybble.engine.errors import OptionError
from nybble.server.bench.bench_serving_report import print_comparison, print_results
from nybble.server.bench.serving_metrics import SLO, summarize
from nybble.server.bench.timed_request import Timing


def row(concurrency: int, scale: float = 1.0) -> dict[str, Any]:
    timings = [
        Timing(0.0, 0.0, scale, [scale, 2 * scale], 4 * scale, 10, 0, 3),
        Timing(0.0, 0.0, end=scale, error="[bold]HTTP 500"),
    ]
    load = {"concurrency": concurrency, "rate": None, "num_requests": 2, "max_seconds": 9.0}
    return {"load": load, "metrics": asdict(summarize(timings, SLO()))}


def document(*rows: dict[str, Any], **options: object) -> dict[str, Any]:
    return {"model": "tiny", "options": {"url": "http://x", **options}, "rows": list(rows)}


def test_results() -> None:
    out = io.StringIO()
    print_results([row(1), row(8)], out)
    text = out.getvalue()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert lines[0] == ["1 at once", "2", "1", "0.75", "3.25", "0.25", "0.25", "10", "3", "1.50", "0%"]
    assert ["8 at once", "TTFT", *["1,000.00"] * 5] in lines and ["", "TPOT", *["500.00"] * 5] in lines
    assert "8 at once: 1 failed: [bold]HTTP 500" in text


def test_comparison_of_the_loads_in_common() -> None:
    out = io.StringIO()
    print_comparison(document(row(1), row(8), seed=0), document(row(8, scale=2.0), row(9), seed=1), out)
    text = out.getvalue()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert lines[0] == ["8 at once", "output tokens/s", "0.75", "0.38", "0.500"]
    assert ["", "TTFT median", "1,000.00", "2,000.00", "2.000"] in lines
    assert ["", "failed", "1.00", "1.00", "1.000"] in lines
    assert "1 at once" not in text and "9 at once" not in text
    assert "not measured alike: seed is 0 in A and 1 in B" in text


def test_nothing_in_common() -> None:
    with pytest.raises(OptionError, match="no load in common"):
        print_comparison(document(row(1)), document(row(2)), io.StringIO())
