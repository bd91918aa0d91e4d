"""`nybble bench engine`: throughput and latency of the engine, offline, as a table, JSON and a plot."""

from __future__ import annotations

import os

from nybble.engine.ranks.tuning import TUNING

os.environ.update(TUNING | os.environ)  # before torch is imported

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import msgspec
from rich.console import Console
from rich.table import Table

from nybble.engine.bench_target import BenchTarget, null_target, rank_target
from nybble.engine.engine_bench import BenchCase, CaseResult, Spread, measure
from nybble.engine.engine_config import EngineConfig
from nybble.engine.engine_process import follow, run_rank
from nybble.engine.errors import OptionError
from nybble.engine.machine import describe_machine
from nybble.engine.messages import EngineStats, HistogramCounts
from nybble.engine.model.null_model import NULL_MODEL
from nybble.engine.ranks.launched_rank import LaunchedRank
from nybble.engine.ranks.start import start_rank

SCHEMA = "nybble-bench-engine/1"
RESULTS = "results.json"
METHOD = (
    "All requests of a case are there from the start, with random prompts and greedy sampling; lengths are "
    "exact. A token's time is the end of its step, its events encoded for the server. Prefill: prompt tokens "
    "until the last request has its first token. Decode: tokens after that."
)
_WIDTH = 150  # where the output is not a terminal, whose width would be taken


@dataclass(frozen=True)
class BenchEngineOptions:
    """batch_sizes, prompt_lengths, output_lengths: every combination is a case; num_queued: see `BenchCase`;
    out: a directory for JSON and plot, or None."""

    batch_sizes: Sequence[int]
    prompt_lengths: Sequence[int]
    output_lengths: Sequence[int]
    num_queued: int
    num_repeats: int
    num_warmups: int
    out: Path | None

    def cases(self) -> list[BenchCase]:
        """Raises OptionError if a number is out of range."""
        for name in ("batch_sizes", "prompt_lengths", "output_lengths"):
            for value in getattr(self, name):
                _check_least(name, value, 1)
        _check_least("repeat", self.num_repeats, 1)
        _check_least("warmup", self.num_warmups, 0)
        _check_least("queued", self.num_queued, 0)
        shapes = itertools.product(self.prompt_lengths, self.output_lengths, self.batch_sizes)
        return [BenchCase(batch, prompt, output, self.num_queued) for prompt, output, batch in shapes]


def bench_engine(config: EngineConfig, options: BenchEngineOptions, out: TextIO) -> int:
    """Measure, print, and write what `options.out` asks for; the exit code. `config.checkpoint` may be
    NULL_MODEL. As one of several launched ranks, rank 0 does all this and the others follow.

    Raises:
        NybbleError: an option is wrong, a rank cannot start, or a run goes wrong.
    """
    cases = options.cases()
    # As many requests at once as the largest case has: what is set up at start is set up for that.
    most = max(options.batch_sizes)
    config = replace(config, scheduler=replace(config.scheduler, max_num_seqs=most))
    if config.checkpoint == NULL_MODEL:
        target = null_target(config, cases)
    elif LaunchedRank.from_environment().rank:
        return run_rank(lambda: follow(config))
    else:
        target = rank_target(start_rank(config))
    try:
        results = _measure_all(target, cases, options)
    finally:
        target.close()
    _print_results(results, out)
    if options.out is not None:
        _write_results(results, target.config, options, out)
    return 0


def _measure_all(
    target: BenchTarget, cases: Sequence[BenchCase], options: BenchEngineOptions
) -> list[CaseResult]:
    for case in cases:
        target.check(case)
    results = []
    for case in cases:
        engine = target.make_engine(case.batch)
        results.append(
            measure(
                engine, case, options.num_repeats, options.num_warmups, num_token_ids=target.num_token_ids
            )
        )
        print(f"{case}: done", file=sys.stderr)
    return results


def _print_results(results: Sequence[CaseResult], out: TextIO) -> None:
    console = Console(file=out, width=None if out.isatty() else _WIDTH, highlight=False)
    table = Table(caption="times: median (p10 .. p90)", caption_justify="left")
    for name in ("batch", "prompt", "output", "prefill tok/s", "decode tok/s"):
        table.add_column(name, justify="right")
    for name in ("first token, ms", "between tokens, ms", "decode step, ms", "least", "steps"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(*_cells(result))
    console.print(table)
    console.print(METHOD)
    for result in results:
        console.print(f"{result.case}: {_describe(result.stats)}")


def _describe(stats: EngineStats) -> str:
    """What the engine says of itself."""
    sequences, tokens = _mean(stats.step_sequences), _mean(stats.step_tokens)
    return (
        f"a step has {sequences:.1f} sequences, {tokens:.1f} tokens and takes "
        f"{_mean(stats.step_time) * 1e3:.2f} ms from launch to tokens; "
        f"{stats.num_cached_tokens} of {stats.num_prompt_tokens} prompt tokens were cached, "
        f"{stats.num_preemptions} preemptions"
    )


def _mean(histogram: HistogramCounts) -> float:
    return histogram.sum / max(histogram.cumulative[-1], 1)


def _cells(result: CaseResult) -> list[str]:
    case, step = result.case, result.decode_step
    return [
        f"{case.batch}",
        f"{case.prompt_length}",
        f"{case.output_length}",
        f"{result.prefill_tokens_per_s:,.0f}",
        "" if result.decode_tokens_per_s is None else f"{result.decode_tokens_per_s:,.1f}",
        _milliseconds(result.time_to_first_token),
        _milliseconds(result.inter_token_latency),
        _milliseconds(step),
        "" if step is None else f"{step.least * 1e3:.2f}",
        f"{result.num_steps}",
    ]


def _milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median * 1e3:.2f} ({spread.p10 * 1e3:.2f} .. {spread.p90 * 1e3:.2f})"


def _write_results(
    results: Sequence[CaseResult], config: EngineConfig, options: BenchEngineOptions, out: TextIO
) -> None:
    assert options.out is not None
    document = {
        "schema": SCHEMA,
        "machine": describe_machine(),
        "method": {"what": METHOD, "warmups": options.num_warmups, "repeats": options.num_repeats},
        "config": asdict(config),
        "rows": [msgspec.to_builtins(result) for result in results],
    }
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / RESULTS).write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise OptionError(f"out: cannot write to {options.out}: {error}") from error
    print(f"wrote {options.out / RESULTS}", file=out)
    draw_plot(document["rows"], options.out, out)


def draw_plot(rows: Any, directory: Path, out: TextIO) -> None:
    """Of the JSON's rows. Where matplotlib is missing, say so."""
    try:
        from nybble.server.bench.bench_engine_plot import save_plot
    except ImportError as error:
        print(f"no plot: {error} (pip install 'nybble[bench]')", file=sys.stderr)
        return
    print(f"wrote {save_plot(rows, directory)}", file=out)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise OptionError(f"{name} is {value}, expected at least {least}")
