"""The rules that compiled kernels must keep.

What must always hold: no spill, no inline assembly that computes wrong numbers (`packed_operands`), no narrow
load from shared memory in a hot loop, no more shared memory than a block can have; where a case says so, a
matrix instruction in the hot loop and at most so many instructions for each item of work. Against the golden
file: the same kernels, and at most 10 % more registers. The other numbers of that file are there to be read
in a diff.

Another Triton makes other code, so against a golden file of another version only what must always hold is
checked, and the result says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nybble.kernels.compiled.resource_report import KernelReport, LoopLimits, LoopReport, Report

MAX_REGISTER_GROWTH = 1.10
# Bytes that a block may ask for: CUDA C++ programming guide, technical specifications by compute capability.
_MAX_SHARED_BYTES = {
    **{80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448},
    **{100: 232_448, 103: 232_448, 120: 101_376, 121: 101_376},
}


@dataclass(frozen=True)
class Comparison:
    """faults: what fails; notes: what was not compared, and why."""

    faults: list[str]
    notes: list[str]


def compare(report: Report, golden: Mapping[str, Any] | None) -> Comparison:
    """`golden` is what an earlier `to_json` wrote, or None if there is no such file."""
    faults = [
        f"sm_{report.arch}, {name}: {fault}"
        for name, kernel in report.kernels.items()
        for fault in _broken_rules(kernel, report.arch)
    ]
    notes = []
    if golden is None:
        faults.append(f"sm_{report.arch}: there is no golden file; write it with --update")
    elif golden["triton"] != report.triton:
        notes.append(
            f"sm_{report.arch}: registers were not compared, since the golden file is of triton "
            f"{golden['triton']} and this is {report.triton}; what must always hold was checked"
        )
    else:
        faults += [f"sm_{report.arch}, {fault}" for fault in _changes(report.kernels, golden["kernels"])]
    return Comparison(faults, notes)


def _broken_rules(kernel: KernelReport, arch: int) -> Iterator[str]:
    """Those that need no golden file."""
    if kernel.stack_bytes:
        yield f"spills {kernel.stack_bytes} bytes of each thread"
    if kernel.shared_bytes > _MAX_SHARED_BYTES[arch]:
        yield f"{kernel.shared_bytes} bytes of shared memory, a block has {_MAX_SHARED_BYTES[arch]}"
    for operand in kernel.scattered_operands:
        yield f"inline assembly takes elements that are no neighbours and computes wrong numbers: {operand}"
    if kernel.hot_loop is not None:
        yield from _broken_loop_rules(kernel.hot_loop, kernel.limits)
    elif kernel.limits is not None:
        yield "has no loop"


def _broken_loop_rules(loop: LoopReport, limits: LoopLimits | None) -> Iterator[str]:
    if loop.narrow_shared_loads:
        yield f"narrow loads from shared memory in the hot loop: {loop.narrow_shared_loads}"
    if limits is None:
        return
    if limits.matrix is not None and not any(opcode.startswith(limits.matrix) for opcode in loop.matrix):
        yield f"no {limits.matrix} in the hot loop, whose matrix instructions are {loop.matrix}"
    if loop.instructions_per_item is None:
        yield "how many passes its hot loop does at once cannot be told: not near a whole number"
    elif loop.instructions_per_item > limits.max_instructions:
        yield f"{loop.instructions_per_item} instructions an item, at most {limits.max_instructions} allowed"


def _changes(kernels: Mapping[str, KernelReport], golden: Mapping[str, Any]) -> Iterator[str]:
    for name in golden.keys() - kernels.keys():
        yield f"{name}: only in the golden file"
    for name, kernel in kernels.items():
        if name not in golden:
            yield f"{name}: not in the golden file"
        elif kernel.registers > golden[name]["registers"] * MAX_REGISTER_GROWTH:
            yield f"{name}: {kernel.registers} registers, {golden[name]['registers']} in the golden file"
