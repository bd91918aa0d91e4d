"""`nybble bench serving`: throughput and latency of a server, through HTTP."""

from __future__ import annotations

import http.client
import json
import math
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from nybble.engine.errors import NybbleError, OptionError
from nybble.server.bench.bench_prompts import Prompts, fit_prompts
from nybble.server.bench.bench_serving_report import print_comparison, print_results
from nybble.server.bench.load import Asked, Load, Work, run_load
from nybble.server.bench.serving_metrics import SLO, ServingMetrics, summarize
from nybble.server.bench.timed_request import Target, described

SCHEMA = "nybble-bench-serving/1"
RESULTS = "results.json"
METHOD = (
    "Streamed chat completions over HTTP/1.1, each on a connection of its own, opened before its clock "
    "starts. TTFT: request sent to first chunk with output. TPOT: (last chunk - first chunk) / (output "
    "tokens - 1). ITL: between chunks with output. E2E: to the end of the response. Tokens are the "
    "server's usage, not chunks; of a server whose streams have no usage, prompts are not counted, and an "
    "answer that ends for its length has the tokens that were asked for. A request that fails counts in no "
    "other figure."
)


class BenchServingError(NybbleError):
    """The server does not answer as the benchmark needs it."""


@dataclass(frozen=True)
class BenchServingOptions:
    """concurrencies, rates: one of the two; each is a load of its own, measured one after the other.

    model: None for the first that the server lists. num_requests: of each load. slo: in seconds.
    """

    url: str
    model: str | None
    key: str | None
    concurrencies: Sequence[int]
    rates: Sequence[float]
    num_requests: int
    num_warmups: int
    max_seconds: float
    num_prompt_tokens: int
    num_shared_tokens: int
    num_output_tokens: int
    ignores_end: bool
    slo: SLO
    seed: int
    num_processes: int
    out: Path | None

    def loads(self) -> list[Load]:
        """Raises OptionError if a number is out of range."""
        if bool(self.concurrencies) == bool(self.rates):
            raise OptionError("one of concurrency and rate is needed, and not both")
        _check_least(self, 1, "num_requests", "num_prompt_tokens", "num_output_tokens", "num_processes")
        _check_least(self, 0, "num_warmups", "num_shared_tokens")
        _check_positive("concurrency", self.concurrencies)
        _check_positive("rate", self.rates)
        _check_positive("max_seconds", [self.max_seconds])
        loads = [Load(number, None, self.num_requests, self.max_seconds) for number in self.concurrencies]
        return loads + [Load(None, rate, self.num_requests, self.max_seconds) for rate in self.rates]

    def described(self) -> dict[str, Any]:
        """As the results say it: without the key."""
        fields = asdict(self) | {"out": str(self.out)}
        del fields["key"]
        return fields


def bench_serving(options: BenchServingOptions, out: TextIO) -> int:
    """Measure, print, and write what `options.out` asks for; the exit code: 1 if nothing was answered under
    some load.

    Raises:
        NybbleError: an option is wrong, or the server does not answer the first requests.
    """
    loads = options.loads()
    target = Target.parse(options.url, options.key)
    model = options.model or _first_model(target)
    prompts = _fit(target, model, options)
    asked = Asked(model, options.num_output_tokens, options.ignores_end)
    rows = []
    for number, load in enumerate(loads):
        # No load's prompts may be in the prefix cache from the one before.
        own = replace(prompts, nonce=f"{prompts.nonce} {number}")
        metrics = _measure(Work(target, asked, own, load, options.seed), options)
        rows.append({"load": asdict(load), "metrics": asdict(metrics)})
        print(f"{load}: {metrics.num_finished} of {metrics.num_requests} requests answered", file=sys.stderr)
    print_results(rows, out)
    print(METHOD, file=out)
    if options.out is not None:
        _write(rows, model, prompts, options, options.out, out)
    return 0 if all(row["metrics"]["num_finished"] for row in rows) else 1


def _measure(work: Work, options: BenchServingOptions) -> ServingMetrics:
    if options.num_warmups:
        prompts = replace(work.prompts, nonce=f"{work.prompts.nonce} warm-up")
        concurrency = min(work.load.concurrency or options.num_warmups, options.num_warmups)
        load = Load(concurrency, None, options.num_warmups, options.max_seconds)
        run_load(replace(work, prompts=prompts, load=load))
    return summarize(run_load(work, options.num_processes), options.slo)


def _fit(target: Target, model: str, options: BenchServingOptions) -> Prompts:
    """Raises OptionError as `fit_prompts`, BenchServingError if the server does not answer."""
    asked = Asked(model, 1, options.ignores_end)

    def count(prompt: str) -> int:
        # Not streamed: not every server tells the usage in streams.
        usage = _ask(target, "/chat/completions", asked.body(prompt, is_stream=False), options.max_seconds)
        return int(usage["usage"]["prompt_tokens"])

    nonce = secrets.token_hex(8)
    try:
        return fit_prompts(options.num_prompt_tokens, options.num_shared_tokens, options.seed, nonce, count)
    except (LookupError, TypeError, ValueError) as error:
        raise BenchServingError(f"{options.url}: no prompt_tokens in the usage of an answer") from error


def _first_model(target: Target) -> str:
    """The first one that the server lists. Raises BenchServingError."""
    try:
        return str(_ask(target, "/models")["data"][0]["id"])
    except (LookupError, TypeError) as error:
        raise BenchServingError(f"{target.url('/models')}: no list of models: {error}") from error


def _ask(target: Target, path: str, body: bytes | None = None, seconds: float = 30.0) -> Any:
    """The JSON of an answer; `body` is posted. Raises BenchServingError."""
    headers = {"Content-Type": "application/json", **target.authorization()}
    request = urllib.request.Request(target.url(path), body, headers)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            said = described(error.read(1 << 16))
        raise BenchServingError(f"{target.url(path)}: HTTP {error.code}: {said}") from error
    except TimeoutError as error:
        raise BenchServingError(f"{target.url(path)}: no answer within {seconds:g} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BenchServingError(f"{target.url(path)}: {error}") from error


def _write(
    rows: Sequence[Any],
    model: str,
    prompts: Prompts,
    options: BenchServingOptions,
    directory: Path,
    out: TextIO,
) -> None:
    from nybble.engine.machine import describe_machine  # takes torch, which the clocks need not wait for

    document = {
        "schema": SCHEMA,
        "client": describe_machine(),
        "method": METHOD,
        "model": model,
        "options": options.described(),
        "prompts": asdict(prompts),
        "rows": rows,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RESULTS).write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise OptionError(f"out: cannot write to {directory}: {error}") from error
    print(f"wrote {directory / RESULTS}", file=out)
    draw_plot(rows, directory, out)


def draw_plot(rows: Sequence[Any], directory: Path, out: TextIO) -> None:
    """Of the JSON's rows. Where matplotlib is missing, say so."""
    try:
        from nybble.server.bench.bench_serving_plot import save_plot
    except ImportError as error:
        print(f"no plot: {error} (pip install 'nybble[bench]')", file=sys.stderr)
        return
    print(f"wrote {save_plot(rows, directory)}", file=out)


def compare(paths: tuple[Path, Path], out: TextIO) -> int:
    """Two results side by side. Raises OptionError if a file is not one, or they have no load in common."""
    print_comparison(_read(paths[0]), _read(paths[1]), out)
    return 0


def _read(path: Path) -> Any:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"compare: {path}: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise OptionError(f"compare: {path}: schema is {schema!r}, expected {SCHEMA!r}")
    return document


def _check_least(options: BenchServingOptions, least: int, *names: str) -> None:
    for name in names:
        if getattr(options, name) < least:
            raise OptionError(f"{name} is {getattr(options, name)}, expected at least {least}")


def _check_positive(name: str, values: Sequence[float]) -> None:
    for value in values:
        if not 0 < value < math.inf:
            raise OptionError(f"{name} is {value:g}, expected a number above 0")
