"""Compiles the launches of cases for every architecture, with no GPU, and compares with the golden files.

A file of cases ends with `check(cases)` as its program:

    python -m nybble.kernels.compiled.resource_cases GOLDEN_DIRECTORY [--update] [--arch 90 ...]
        [--processes 2]

prints a table and what is wrong, and fails if anything is. GOLDEN_DIRECTORY/resources-sm_XX.json is what was
found before; --update writes it anew. TRITON_CACHE_DIR keeps what was compiled for the next time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from nybble.kernels.compiled.aot import TRITON_VERSION, launch_resources
from nybble.kernels.compiled.resource_report import (
    Case,
    KernelReport,
    Report,
    ReportError,
    report_case,
    table,
)
from nybble.kernels.compiled.resource_rules import compare

ARCHES = (80, 90, 100, 120)
Cases = Callable[[int], Sequence[Case]]


def check(cases: Cases, arguments: Sequence[str] | None = None) -> int:
    """The program: 0 if all is well. `cases` gives those of an architecture, always in the same order; it
    must be a function that another process can import. Raises ReportError."""
    options = _parser().parse_args(arguments)
    num_faults = 0
    for report in reports(cases, options.arch, options.processes):
        path = options.golden / f"resources-sm_{report.arch}.json"
        if options.update:
            path.write_text(report.to_json())
        comparison = compare(report, json.loads(path.read_text()) if path.exists() else None)
        print(table(report), *comparison.notes, *comparison.faults, "", sep="\n", flush=True)
        num_faults += len(comparison.faults)
    return int(num_faults > 0)


def reports(cases: Cases, arches: Sequence[int], num_processes: int) -> Iterator[Report]:
    """One for each architecture, compiled by several processes. Raises ReportError."""
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        for arch in arches:
            names = [case.name for case in cases(arch)]
            if len(set(names)) < len(names):
                raise ReportError(f"two cases have the same name, of {names}")
            kernels: dict[str, KernelReport] = {}
            for found in pool.map(partial(_report_one, cases, arch), range(len(names))):
                kernels |= found
            yield Report(TRITON_VERSION, arch, kernels)


def _report_one(cases: Cases, arch: int, index: int) -> dict[str, KernelReport]:
    return report_case(cases(arch)[index], partial(launch_resources, arch=arch))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="compile the kernels with no GPU and check what they take")
    parser.add_argument("golden", type=Path, help="directory of the golden files")
    parser.add_argument("--update", action="store_true", help="write the golden files")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHES, help="compute capabilities, 90 for 9.0"
    )
    parser.add_argument("--processes", type=int, default=2, help="that compile at the same time")
    return parser
