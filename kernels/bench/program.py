"""The kernel benchmark as a program; `nybble bench ops` starts it. It needs torch and Triton only:

python -m nybble.kernels.bench.program --quick --out results
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nybble.kernels.bench.cases import GLM_4_7, BenchCase, select_cases
from nybble.kernels.bench.compare import compare_reports, comparison_table
from nybble.kernels.bench.inputs import BenchInputs
from nybble.kernels.bench.machine import describe_gpu, describe_software, measure_roofs
from nybble.kernels.bench.markdown import omission_line, progress_line, summary
from nybble.kernels.bench.measured import Bench, measured_results
from nybble.kernels.bench.model import FORMULA
from nybble.kernels.bench.options import BenchOptions, parse_options
from nybble.kernels.bench.report import OURS, BenchFileError, BenchReport, Omission, Row, read_report
from nybble.kernels.bench.static import read_kernel, static_results
from nybble.kernels.bench.timing import CudaStopwatch
from nybble.kernels.bench.tunable import tunables
from nybble.kernels.bench.tune import Tuned, launches_of, tune, tuning_lines
from nybble.kernels.compiled.aot import TRITON_VERSION
from nybble.kernels.compiled.resource_check import ARCHES
from nybble.kernels.triton.launch_table import LaunchTable

RESULTS, SUMMARY = "results.json", "summary.md"
_TIMING = (
    "median of 11 to 51 runs, each the replay of a CUDA graph after twice the L2 cache was read from "
    "elsewhere; "
    " "
    ""
    "all times include the start of a graph (least_us). The roof is the larger of bytes / bandwidth of a "
    "copy and "
    "flops / rate of a large bfloat16 product, both measured in this run; bytes and flops are the least "
    "that the "
    "op needs. Errors are in units of the RMS of the reference, which is float32 torch on the same operands"
)

_WIDTH = 110

Results = Iterable[Row | Omission]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 if a check failed or something got slower, 2 if it cannot be done."""
    options = parse_options(arguments)
    try:
        return _run(options)
    except (BenchFileError, UnusableError) as error:
        print(f"nybble bench ops: {error}", file=sys.stderr)
        return 2


class UnusableError(Exception):
    """What was asked for cannot be done on this machine."""


def _run(options: BenchOptions) -> int:
    if options.compare is not None:
        comparison = compare_reports(*map(read_report, options.compare))
        print(comparison_table(comparison))
        return int(bool(comparison.regressions))
    cases = select_cases(options.selection)
    if not cases:
        raise UnusableError("no case is selected")
    if options.tune is not None:
        return _tune(cases, options.tune)
    is_measured = torch.cuda.is_available() and not options.static
    report = _measure(cases, options) if is_measured else _model(cases, options)
    if options.out is not None:
        write(report, options.out)
    return int(bool(report.faults))


def write(report: BenchReport, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RESULTS).write_text(report.to_json())
    (directory / SUMMARY).write_text(summary(report))
    print(f"wrote {directory / RESULTS} and {directory / SUMMARY}")


def _model(cases: Sequence[BenchCase], options: BenchOptions) -> BenchReport:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UnusableError("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")
    gpu = options.gpu
    print(f"no GPU is used: kernels are compiled for {gpu.name}, times are modelled", flush=True)
    print(textwrap.fill(FORMULA, _WIDTH), end="\n\n", flush=True)
    results = static_results(cases, GLM_4_7, gpu, options.processes)
    machine = {"modelled": gpu.name} | describe_software(TRITON_VERSION)
    roofs = {"gb_per_s": gpu.bandwidth_tbps * 1e3, "bf16_tflop_per_s": gpu.bf16_tflops}
    return _report(machine, {"times": f"modelled: {FORMULA}"}, roofs, _until(results, cases, options.seconds))


def _measure(cases: Sequence[BenchCase], options: BenchOptions) -> BenchReport:
    device, stopwatch = torch.device("cuda", torch.cuda.current_device()), CudaStopwatch()
    machine = describe_gpu() | describe_software(TRITON_VERSION)
    roofs = measure_roofs(stopwatch, device)
    print(", ".join(f"{name} {value}" for name, value in (machine | roofs).items()), flush=True)
    bench = Bench(
        model=GLM_4_7,
        device=device,
        arch=_arch(),
        stopwatch=stopwatch,
        roofs=roofs,
        free_bytes=torch.cuda.mem_get_info()[0],
        read_kernel=partial(read_kernel, arch=_capability()),
        with_peers=options.with_peers,
        quick=options.selection.quick,
    )
    results = (result for case in cases for result in _measured(case, bench))
    return _report(machine, {"times": _TIMING}, roofs, _until(results, cases, options.seconds))


def _measured(case: BenchCase, bench: Bench) -> Results:
    yield from measured_results(case, bench)
    torch.cuda.empty_cache()


def _until(results: Results, cases: Sequence[BenchCase], seconds: float | None) -> Iterator[Row | Omission]:
    """Results, until time is over; then the cases that have none, as omissions."""
    start, done = time.monotonic(), set()
    for result in results:
        done.add(result.case.name if isinstance(result, Row) else result.name)
        yield result
        if seconds is not None and time.monotonic() - start > seconds:
            reason = f"not begun within {seconds:g} seconds"
            yield from (Omission(case.name, OURS, reason) for case in cases if case.name not in done)
            return


def _report(
    machine: dict[str, Any], method: dict[str, Any], roofs: dict[str, float], results: Results
) -> BenchReport:
    """Prints what comes as it comes."""
    rows, omissions = [], []
    for result in results:
        if isinstance(result, Row):
            rows.append(result)
            print(progress_line(result), flush=True)
        else:
            omissions.append(result)
            print(omission_line(result), flush=True)
    return BenchReport(machine, method, roofs, tuple(rows), tuple(omissions))


def _tune(cases: Sequence[BenchCase], path: Path) -> int:
    if not torch.cuda.is_available():
        raise UnusableError("--tune needs a GPU, and torch finds no CUDA device on this machine")
    stopwatch, arch = CudaStopwatch(), _arch()
    inputs = BenchInputs(torch.device("cuda", torch.cuda.current_device()), arch)
    found: list[Tuned] = []
    for case in cases:
        for tunable in tunables(case, GLM_4_7, inputs):
            found.append(tune(tunable, stopwatch))
            print(*tuning_lines(found[-1]), sep="\n", flush=True)
        torch.cuda.empty_cache()
    table = LaunchTable(launches_of(found, arch), torch.cuda.get_device_name(), TRITON_VERSION)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table.to_json())
    print(f"wrote {len(table.launches)} launches to {path}")
    return 0


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _arch() -> int:
    """The architecture that kernels are configured for: 8.9 as 8.0, 12.1 as 12.0."""
    capability = _capability()
    if capability < ARCHES[0]:
        raise UnusableError(f"the kernels need compute capability 8.0, this GPU has {capability / 10}")
    return max(arch for arch in ARCHES if arch <= capability)


if __name__ == "__main__":
    sys.exit(main())
