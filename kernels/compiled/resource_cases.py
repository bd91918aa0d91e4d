"""The launches of GLM-4.7 whose compiled code is kept in golden files, with the limits of their hot loops.

    python -m nybble.kernels.compiled.resource_cases tests/kernels/golden [--update] [--arch 90 ...]

They are recorded from the benchmark's cases, so that what is checked is what the backend launches. Launches
that Triton would compile to the same code stand only under the first case that has them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor

from nybble.kernels.bench.cases import FP4_FORMATS, GLM_4_7, BenchCase
from nybble.kernels.bench.static import case_launches
from nybble.kernels.compiled.loop_pass import kernel_name, loop_pass
from nybble.kernels.compiled.resource_check import check
from nybble.kernels.compiled.resource_limits import loop_rule
from nybble.kernels.compiled.resource_report import Case, LoopLimits
from nybble.kernels.triton.launch import KernelLaunch, launch

_HOPPER = 90


def bench_cases(arch: int) -> Iterator[BenchCase]:
    """Decode and prefill, one GPU and eight, in an order that names the most telling first."""
    for format, tp, tokens in product(FP4_FORMATS, (1, 8), (1, 8, 16, 512)):
        yield BenchCase("experts", tp, tokens, format, "uniform")
    yield BenchCase("experts", 1, 4096, "nvfp4", "uniform")
    for format in FP4_FORMATS:
        yield BenchCase("qkv", 1, 1, format)
        yield BenchCase("head", 1, 8, format)
        yield BenchCase("qkv", 8, 64, format)
    for tp, tokens in ((1, 1), (8, 1), (1, 512)):
        yield BenchCase("qkv", tp, tokens, "fp8")
    for format in ("bf16", "fp8") if arch >= _HOPPER else ("bf16",):
        yield BenchCase("attention", 8, 1, format, context=131072)
        yield BenchCase("attention", 1, 32, format, context=8192)
        yield BenchCase("prefill_attention", 1, 4096, format, context=32768)
        yield BenchCase("store_qkv", 8, 1, format)
        yield BenchCase("store_qkv", 1, 4096, format)
    for op, format, tokens in (("router", "fp32", 1), ("router", "fp32", 512), ("norm", "bf16", 1)):
        yield BenchCase(op, 1, tokens, format)
    yield BenchCase("sampling", 1, 8, "fp32")


def cases(arch: int) -> list[Case]:
    """One for each launch that is compiled differently from those before."""
    found: dict[object, Case] = {}
    for bench_case in bench_cases(arch):
        launches = case_launches(bench_case, GLM_4_7, arch)
        for number, recorded in enumerate(launches, 1):
            name = bench_case.name if len(launches) == 1 else f"{bench_case.name}, launch {number}"
            found.setdefault(_kind(recorded), _case(name, recorded, bench_case.format, arch))
    return list(found.values())


def _case(name: str, recorded: KernelLaunch, format: str, arch: int) -> Case:
    again = partial(launch, recorded.kernel, recorded.grid, *recorded.arguments, **recorded.options)
    loop = loop_pass(recorded)
    if loop is None:
        return Case(name, again)
    rule = loop_rule(kernel_name(recorded), recorded.options, format, arch)
    limits = LoopLimits(loop.items, rule.max_instructions, rule.matrix, loaded_bytes=loop.loaded_bytes)
    return Case(name, again, {kernel_name(recorded): limits})


def _kind(recorded: KernelLaunch) -> object:
    """Equal where Triton makes the same code."""
    arguments = tuple(_argument_kind(argument) for argument in recorded.arguments)
    return kernel_name(recorded), tuple(sorted(recorded.options.items(), key=str)), arguments


def _argument_kind(argument: Any) -> object:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.storage_offset() * argument.element_size() % 16
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0
    return argument if argument is None else type(argument)


if __name__ == "__main__":
    sys.exit(check(cases))
