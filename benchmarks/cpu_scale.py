"""What a token costs with a long context and beside other chats, on the native CPU backend with the demo
model.

    .venv/bin/python benchmarks/cpu_scale.py [--threads 2] [--repeat 3] [--output FILE.json]

Needs a quiet machine. Writes the figures as JSON and a plot beside it. Decoding: milliseconds of a step,
of the 16 that follow a context of random tokens; the median of a run's steps, and of the runs the median,
lowest and highest. Prefill: milliseconds for a token of a whole prompt. Before any time is taken the model
must name Paris.
"""

from __future__ import annotations

import os

from nybble.engine.ranks.tuning import TUNING

os.environ.update(TUNING | os.environ)  # before torch is imported

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from demo_engine import Decoding, DemoEngine
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nybble.engine.engine_config import EngineConfig
from nybble.engine.machine import describe_machine

CONTEXTS = (1, 16, 64, 256, 512, 1024, 2048, 4096, 8000)
CHATS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CHAT_CONTEXT = 128
NUM_STEPS = 16
SHORTEST_PROMPT = 64  # in the plot: a shorter one costs what a step of decoding does
Point = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", default="build/demo-checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu-scale.json"))
    options = parser.parse_args()
    config = EngineConfig(checkpoint=options.checkpoint, backend="cpu", cpu_threads=options.threads)
    curves = measure(DemoEngine(config), options.repeat)
    report = {
        "schema": "nybble-cpu-scale/1",
        "machine": describe_machine(),
        "threads": options.threads,
        "unit": "milliseconds a token (decode_by_context, prefill_by_length), or a step (step_by_chats)",
        "chat_context": CHAT_CONTEXT,
        "curves": curves,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    draw(curves).savefig(options.output.with_suffix(".png"), dpi=120)


def measure(demo: DemoEngine, repeat: int) -> dict[str, list[Point]]:
    """The repeats go over all sizes in turn, so that a slow minute does not bend a curve."""
    demo.decode(1, NUM_STEPS, CHAT_CONTEXT)  # warms up
    contexts, chats = [], []
    for _ in range(repeat):
        contexts.append([run(demo, 1, length) for length in CONTEXTS])
        chats.append([run(demo, num_chats, CHAT_CONTEXT) for num_chats in CHATS])
    return {
        "decode_by_context": curve(CONTEXTS, contexts, step_milliseconds),
        "prefill_by_length": curve(CONTEXTS, contexts, prompt_milliseconds),
        "step_by_chats": curve(CHATS, chats, step_milliseconds),
    }


def run(demo: DemoEngine, num_chats: int, length: int) -> Decoding:
    time.sleep(1)  # whoever waits for the cores gets a turn
    return demo.decode(num_chats, NUM_STEPS, length)


def step_milliseconds(decoding: Decoding) -> float:
    return 1000 * statistics.median(decoding.step_seconds)


def prompt_milliseconds(decoding: Decoding) -> float:
    """A token of the prompt."""
    return 1000 * decoding.prompt_seconds / decoding.length


def curve(
    sizes: Sequence[int], repeats: list[list[Decoding]], cost: Callable[[Decoding], float]
) -> list[Point]:
    values = [[cost(decoding) for decoding in of_size] for of_size in zip(*repeats, strict=True)]
    return [
        {"size": size, "median": statistics.median(costs), "lowest": min(costs), "highest": max(costs)}
        for size, costs in zip(sizes, values, strict=True)
    ]


def draw(curves: dict[str, list[Point]]) -> Figure:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    context, prefill, chats = figure.subplots(1, 3)
    _draw(context, curves["decode_by_context"], "one chat, decoding", "tokens of context", "ms a token")
    prompts = [point for point in curves["prefill_by_length"] if point["size"] >= SHORTEST_PROMPT]
    _draw(prefill, prompts, "one chat, prefill", "tokens of the prompt", "ms a token")
    together = curves["step_by_chats"]
    _draw(chats, together, f"chats with {CHAT_CONTEXT} tokens, decoding", "chats", "ms", "a step")
    _draw(chats, [_per_token(point) for point in together], chats.get_title(), "chats", "ms", "a token")
    chats.legend()
    return figure


def _per_token(point: Point) -> Point:
    share = {name: value / point["size"] for name, value in point.items()}
    return {**share, "size": point["size"]}


def _draw(
    axis: Axes, points: Sequence[Point], title: str, x_label: str, y_label: str, label: str | None = None
) -> None:
    def column(name: str) -> list[float]:
        return [point[name] for point in points]

    (line,) = axis.plot(column("size"), column("median"), marker="o", markersize=3, label=label)
    low, high = column("lowest"), column("highest")
    axis.fill_between(column("size"), low, high, color=line.get_color(), alpha=0.2)
    axis.set(title=title, xlabel=x_label, ylabel=y_label, ylim=(0, None))
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
