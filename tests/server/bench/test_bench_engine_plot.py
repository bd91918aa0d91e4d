from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from nybble.server.bench.bench_engine_plot import draw, save_plot


def row(batch: int, prompt: int = 128, output: int = 64) -> dict[str, Any]:
    spread = {"median": 0.002 * batch, "p10": 0.001 * batch, "p90": 0.005 * batch, "least": 0.001 * batch}
    return {
        "case": {"batch": batch, "prompt_length": prompt, "output_length": output, "num_queued": 0},
        "prefill_tokens_per_s": 100.0 * batch,
        "decode_tokens_per_s": 10.0 * batch if output > 1 else None,
        "time_to_first_token": spread,
        "inter_token_latency": spread if output > 1 else None,
    }


def test_file(tmp_path: Path) -> None:
    path = save_plot([row(1), row(8)], tmp_path)
    assert path == tmp_path / "engine.png" and path.read_bytes().startswith(b"\x89PNG")


def test_a_line_for_each_length_over_the_batch() -> None:
    prefill, decode, first, between = draw([row(8), row(1), row(1, 2048), row(8, 2048)]).axes
    assert [axis.get_title() for axis in (prefill, decode, first, between)] == [
        "prefill",
        "decode",
        "time to first token",
        "between tokens",
    ]
    line, other = prefill.lines
    assert (line.get_label(), other.get_label()) == ("128 + 64", "2,048 + 64")
    assert list(line.get_xdata()) == [1, 8] and list(line.get_ydata()) == [100.0, 800.0]
    assert list(decode.lines[0].get_ydata()) == [10.0, 80.0]
    assert list(first.lines[0].get_ydata()) == [2.0, 16.0] and len(between.collections) == 2
    assert [label.get_text() for label in first.get_xticklabels()] == ["1", "8"]


def test_what_has_no_value_has_no_point() -> None:
    prefill, decode, first, between = draw([row(1, output=1)]).axes
    assert len(prefill.lines) == len(first.lines) == 1
    assert len(decode.lines) == len(between.lines) == 0
