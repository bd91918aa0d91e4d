"""Prefill and decode speed of the demo model on this machine, in one process, through the engine.

    .venv/bin/python benchmarks/demo_speed.py [--checkpoint DIR] [--backend cpu] [--repeat 5]

Prints a Markdown table. Before any time is taken the model must name Paris; else there is none. Prefill:
one prompt of random tokens, its length over the time of its steps. Decode: after a short prompt, tokens
per second of all requests together, first tokens excluded. Median (min .. max) of the repeats.
"""

from __future__ import annotations

import os

from nybble.engine.ranks.tuning import TUNING

os.environ.update(TUNING | os.environ)  # before torch is imported

import argparse
import statistics
from collections.abc import Callable

import torch
from demo_engine import DemoEngine

from nybble.engine.engine_config import EngineConfig
from nybble.engine.machine import processor_name

PREFILL_LENGTHS = (128, 512, 2048)
BATCHES = (1, 8, 32)
NUM_DECODED = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", default="build/demo-checkpoint")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--deterministic", action="store_true")
    options = parser.parse_args()
    demo = DemoEngine(
        EngineConfig(
            checkpoint=options.checkpoint, backend=options.backend, deterministic=options.deterministic
        )
    )
    threads = f"{torch.get_num_threads()} threads"
    print(f"{processor_name()}, torch {torch.__version__}, {threads}, backend {demo.config.backend}\n")
    print("| what | tokens/s, median (min .. max) |\n| --- | --- |")
    for length in PREFILL_LENGTHS:
        rate = _summary(lambda n=length: n / demo.prefill_seconds(n), options.repeat)
        print(f"| prefill, {length} tokens | {rate} |")
    for batch in BATCHES:
        rate = _summary(lambda n=batch: demo.decode(n, NUM_DECODED).rate, options.repeat)
        print(f"| decode, {batch} at once | {rate} |")


def _summary(measure: Callable[[], float], repeat: int) -> str:
    rates = [measure() for _ in range(repeat + 1)][1:]  # the first warms up
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} .. {max(rates):.1f})"


if __name__ == "__main__":
    main()
