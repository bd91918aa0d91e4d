"""The command line of `nybble bench serving`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from nybble.engine.errors import OptionError

_KEY = "OPENAI_API_KEY"


def add_bench_serving(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "serving",
        help="throughput and latency of any OpenAI-compatible server",
        description="Streams chat completions from a server and says how fast they come. The API key, if "
        f"one is needed, is taken from the environment variable {_KEY}.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL of the API (%(default)s)")
    parser.add_argument("--model", metavar="NAME", help="its model (default: the first that it lists)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="requests at once; each is measured",
    )
    load.add_argument(
        "--rate", type=float, nargs="+", default=[], metavar="X", help="or requests a second (Poisson)"
    )
    _add_numbers(parser)
    parser.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for answers of exactly that length; some servers refuse the field (default: on)",
    )
    parser.add_argument(
        "--slo",
        nargs="+",
        default=[],
        metavar="NAME=MS",
        help="what goodput asks of a request: ttft, tpot, e2e in ms, as in ttft=500 tpot=50",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json and serving.png there")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="measure nothing; show two results.json side by side",
    )
    parser.set_defaults(run=_run)


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("num-requests", 256, "requests of each load"),
        ("warmup", 8, "requests before each load, which do not count"),
        ("prompt-tokens", 256, "tokens of a prompt, as near as words come to it"),
        ("shared-prefix", 0, "so many of them are the same in all prompts"),
        ("output-tokens", 128, "tokens of an answer"),
        ("seed", 0, "of arrivals and prompts; prompts are new in each run"),
        ("processes", 1, "that send the requests"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} ({default})")
    parser.add_argument(
        "--max-seconds", type=float, default=300.0, metavar="X", help="a load ends after that time (300)"
    )


def _run(options: argparse.Namespace) -> None:
    from nybble.server.bench.bench_serving import BenchServingOptions, bench_serving, compare
    from nybble.server.bench.serving_metrics import SLO

    if options.compare is not None:
        sys.exit(compare(tuple(options.compare), sys.stdout))
    bench_options = BenchServingOptions(
        url=options.url,
        model=options.model,
        key=os.environ.get(_KEY) or None,
        concurrencies=options.concurrency or ([] if options.rate else [1, 8, 32]),
        rates=options.rate,
        num_requests=options.num_requests,
        num_warmups=options.warmup,
        max_seconds=options.max_seconds,
        num_prompt_tokens=options.prompt_tokens,
        num_shared_tokens=options.shared_prefix,
        num_output_tokens=options.output_tokens,
        ignores_end=options.ignore_eos,
        slo=SLO(**parse_slo(options.slo)),
        seed=options.seed,
        num_processes=options.processes,
        out=options.out,
    )
    sys.exit(bench_serving(bench_options, sys.stdout))


def parse_slo(words: list[str]) -> dict[str, float]:
    """Seconds by name, from words such as ttft=500. Raises OptionError."""
    limits = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            milliseconds = float(text)
        except ValueError:
            milliseconds = -1.0
        if name not in ("ttft", "tpot", "e2e") or not milliseconds > 0:
            raise OptionError(f"slo is {word!r}, expected ttft=MS, tpot=MS or e2e=MS")
        limits[name] = milliseconds / 1e3
    return limits
