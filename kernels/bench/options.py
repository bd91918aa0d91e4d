"""The command line of the kernel benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nybble.kernels.bench.cases import OPS, ROUTINGS, Selection
from nybble.kernels.bench.gpu_models import GPU_MODELS, GpuModel, find_gpu_model
from nybble.kernels.triton.launch_table import default_launch_table

_DESCRIPTION = """\
Benchmark the kernels at GLM-4.7's shapes. On a GPU each is checked against plain torch first and then timed;
with none they are compiled, and times are modelled from the code. The exit code is 1 if a check fails, or
with --compare if something got slower; 2 if what was asked for cannot be done here."""


@dataclass(frozen=True)
class BenchOptions:
    """static: compile and model even if there is a GPU. tune: where the launch table goes. seconds: after
    which no further case is begun."""

    selection: Selection
    static: bool
    gpu: GpuModel
    out: Path | None
    compare: tuple[Path, Path] | None
    tune: Path | None
    with_peers: bool
    seconds: float | None
    processes: int


def parse_options(arguments: Sequence[str] | None = None) -> BenchOptions:
    """Exits with code 2 if they are wrong."""
    parser = _parser()
    found = parser.parse_args(arguments)
    try:
        gpu = find_gpu_model(found.gpu)
    except ValueError as error:
        parser.error(str(error))
    return BenchOptions(
        selection=Selection(
            ops=tuple(found.op),
            tps=tuple(found.tp),
            tokens=tuple(found.tokens),
            formats=tuple(found.format),
            contexts=tuple(found.context),
            routings=tuple(found.routing),
            quick=found.quick,
        ),
        static=found.static,
        gpu=gpu,
        out=found.out,
        compare=tuple(found.compare) if found.compare else None,
        tune=found.tune,
        with_peers=found.peers,
        seconds=found.seconds,
        processes=found.processes,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nybble bench ops",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_selection(parser.add_argument_group("cases", "several values restrict to any of them"))
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write results.json, summary.md and plots here"
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="compare two results, run nothing"
    )
    parser.add_argument(
        "--tune",
        type=Path,
        nargs="?",
        const=default_launch_table(),
        metavar="FILE",
        help="try other launch configurations and write the best to FILE (%(const)s); needs a GPU",
    )
    parser.add_argument("--static", action="store_true", help="compile and model, though there is a GPU")
    names = ", ".join(model.name for model in GPU_MODELS)
    parser.add_argument(
        "--gpu", default="H100", metavar="NAME", help=f"model times of this GPU: {names} (%(default)s)"
    )
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="time other libraries, too"
    )
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no case after so many seconds")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="that compile (%(default)s)")
    return parser


def _add_selection(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--quick", action="store_true", help="two dozen cases that say most")
    group.add_argument("--op", nargs="+", default=(), choices=OPS, metavar="OP", help=", ".join(OPS))
    group.add_argument("--tp", type=_count, nargs="+", default=(), metavar="N", help="tensor-parallel ranks")
    group.add_argument(
        "--tokens", type=_count, nargs="+", default=(), metavar="N", help="of attention: sequences"
    )
    group.add_argument("--format", nargs="+", default=(), metavar="F", help="nvfp4, mxfp4, fp8, bf16, fp32")
    group.add_argument("--context", type=_count, nargs="+", default=(), metavar="N", help="of attention")
    group.add_argument(
        "--routing", nargs="+", default=(), choices=ROUTINGS, metavar="R", help=", ".join(ROUTINGS)
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
