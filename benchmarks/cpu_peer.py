"""The native CPU backend and llama.cpp, with one model and as many threads, on one machine, in turns.

    .venv/bin/python benchmarks/cpu_peer.py [--peer build/llama-cpp] [--threads 2] [--repeat 5]

Needs a quiet machine. Prints medians, the lowest and highest, and the median of the ratios of neighbouring
runs. Theirs is llama-bench (no scheduler, no sampling) on the Q4_1 GGUF that the demo checkpoint is made
from; ours is the whole engine, greedy, on the demo checkpoint. A decode run gives 128 tokens to one chat;
a prefill is a prompt of 512. Before any time is taken the engine's model must name Paris.
"""

from __future__ import annotations

import os

from nybble.engine.ranks.tuning import TUNING

os.environ.update(TUNING | os.environ)  # before torch is imported

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_engine import DemoEngine
from demo_server import DemoServer, demo_server
from llama_cpp import VERSION, LlamaCpp, build

from nybble.engine.engine_config import EngineConfig
from nybble.engine.machine import describe_machine

NUM_DECODED, NUM_PROMPT = 128, 512
NUM_REQUESTS = 20
METHOD = (
    "Runs of both take turns; tokens a second. Ratio: ours over theirs of a turn, median of the turns. "
    f"decode: {NUM_DECODED} tokens of one chat; prefill: a prompt of {NUM_PROMPT} tokens; decode_8: "
    f"{NUM_DECODED // 4} tokens of each of 8 chats, all tokens together; first_token: milliseconds from a "
    "short chat's request to its first token, within the engine; first_token_http: the same at an HTTP "
    f"client of `nybble serve` on this machine, of {NUM_REQUESTS} requests the median."
)
Measure = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", default="build/demo-checkpoint")
    parser.add_argument("--peer", type=Path, default=Path("build/llama-cpp"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu-peer.json"))
    options = parser.parse_args()
    peer = build(options.peer)
    config = EngineConfig(checkpoint=options.checkpoint, backend="cpu", cpu_threads=options.threads)
    demo = DemoEngine(config)
    serving = demo_server(options.checkpoint, "--backend", "cpu", "--cpu-threads", str(options.threads))
    with serving as server:
        runs = take_turns(measures(demo, server, peer, options.threads), options.repeat)
    report = {
        "schema": "nybble-cpu-peer/1",
        "machine": describe_machine(),
        "peer": f"llama-bench of llama-cpp-python {VERSION}",
        "threads": options.threads,
        "method": METHOD,
        "load_average": os.getloadavg(),
        "runs": runs,
        "summary": summarize(runs),
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print_summary(report["summary"])


def measures(demo: DemoEngine, server: DemoServer, peer: LlamaCpp, threads: int) -> dict[str, Measure]:
    return {
        "decode": lambda: demo.decode(1, NUM_DECODED, length=1).rate,
        "decode_peer": lambda: peer.rate(0, NUM_DECODED, threads),
        "prefill": lambda: NUM_PROMPT / demo.prefill_seconds(NUM_PROMPT),
        "prefill_peer": lambda: peer.rate(NUM_PROMPT, 0, threads),
        "decode_8": lambda: demo.decode(8, NUM_DECODED // 4, length=1).rate,
        "first_token": lambda: demo.first_token_seconds() * 1000,
        "first_token_http": lambda: server.first_token_seconds(NUM_REQUESTS) * 1000,
    }


def take_turns(measures: dict[str, Measure], repeat: int) -> dict[str, list[float]]:
    runs: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(repeat + 1):
        for name, measure in measures.items():
            time.sleep(
                1
            )  # what ran before has its threads asleep, and whoever waits for the cores gets a turn
            value = measure()
            if turn:  # the first warms up
                runs[name].append(round(value, 3))
    return runs


def summarize(runs: dict[str, list[float]]) -> dict[str, Any]:
    def ratio(above: str, below: str) -> float:
        pairs = zip(runs[above], runs[below], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    medians = {name: statistics.median(values) for name, values in runs.items()}
    spread = {name: (min(values), max(values)) for name, values in runs.items()}
    ratios = {
        "decode": ratio("decode", "decode_peer"),
        "prefill": ratio("prefill", "prefill_peer"),
        "decode_8_over_decode": ratio("decode_8", "decode"),
    }
    return {"medians": medians, "spread": spread, "ratios": ratios}


def print_summary(summary: dict[str, Any]) -> None:
    print("| what | median (min .. max) |\n| --- | --- |")
    for name, median in summary["medians"].items():
        low, high = summary["spread"][name]
        print(f"| {name} | {median:.1f} ({low:.1f} .. {high:.1f}) |")
    for name, ratio in summary["ratios"].items():
        print(f"| ratio: {name} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
