"""What the kernels of a case take on one architecture, and what their hot loops cost for each item of work.

A case calls a launcher with meta tensors, so nothing runs and no memory is taken. The rules for its kernels
are in kernels/compiled/resource_rules.py, the program that checks them in kernels/compiled/resource_check.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from nybble.kernels.compiled.sass import InstructionMix, Resources
from nybble.kernels.triton.launch import KernelLaunch, recorded_launches

# How far from a whole number the passes of a loop may be found: some threads load what others load too.
_PASSES_TOLERANCE = 0.2


class ReportError(Exception):
    """A case cannot be reported: a kernel does not compile, or is not launched though it has limits."""


@dataclass(frozen=True)
class LoopLimits:
    """What a hot loop may cost, for each of the items of work (weights, KV elements) that it handles.

    items: that a block handles in one pass of the loop in the source
    max_instructions: for an item, summed over threads
    matrix: how the opcode begins that must stand in the loop ("HGMMA", "OMMA.SF"); None if any loop will do

    A compiled loop may do several passes of the source's at once. Either of these tells how many; with
    neither, it is taken to do one.
    num_matrix: matrix instructions of a thread in one pass
    loaded_bytes: that a block loads in one pass, from global memory and not by the copy engine
    """

    items: int
    max_instructions: float
    matrix: str | None = None
    num_matrix: int | None = None
    loaded_bytes: int | None = None


@dataclass(frozen=True)
class Case:
    """A launcher at one shape, with the launch config of one architecture.

    run: calls it with meta tensors; may launch several kernels
    loops: limits of hot loops by the name of their kernel
    """

    name: str
    run: Callable[[], object]
    loops: Mapping[str, LoopLimits] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopReport:
    """passes, instructions_per_item: None if they are not asked for, or cannot be told."""

    instructions: int
    matrix: dict[str, int]
    narrow_shared_loads: dict[str, int]
    loaded_bytes_per_thread: int
    passes: int | None
    instructions_per_item: float | None


@dataclass(frozen=True)
class KernelReport:
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    tensor_memory: int
    instructions: int
    scattered_operands: tuple[str, ...]
    hot_loop: LoopReport | None
    limits: LoopLimits | None


@dataclass(frozen=True)
class Report:
    """kernels: by "case: kernel"; where a case launches a kernel again, "case: kernel 2" and so on."""

    triton: str
    arch: int
    kernels: dict[str, KernelReport]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def report_case(case: Case, resources_of: Callable[[KernelLaunch], Resources]) -> dict[str, KernelReport]:
    """The kernels that one case launches. Raises ReportError."""
    with recorded_launches() as launches:
        case.run()
    if missing := set(case.loops) - {_kernel_name(launch) for launch in launches}:
        raise ReportError(f"{case.name} does not launch {', '.join(sorted(missing))}")
    kernels = {}
    for name, launch in _named(launches):
        try:
            resources = resources_of(launch)
        except Exception as error:
            raise ReportError(f"{case.name}: {name}: {type(error).__name__}: {error}") from error
        kernels[f"{case.name}: {name}"] = _report(resources, case.loops.get(_kernel_name(launch)))
    return kernels


def table(report: Report) -> str:
    """One line for each kernel; instructions for an item stand before their limit."""
    lines = [("registers", "stack", "shared", "warps", "loop", "per item", "limit", f"sm_{report.arch}")]
    for name, kernel in report.kernels.items():
        loop, limits = kernel.hot_loop, kernel.limits
        cost = loop.instructions_per_item if loop else None
        lines.append(
            (
                str(kernel.registers),
                str(kernel.stack_bytes),
                str(kernel.shared_bytes),
                str(kernel.num_warps),
                str(loop.instructions) if loop else "-",
                "-" if cost is None else f"{cost:.2f}",
                f"{limits.max_instructions:.2f}" if limits else "-",
                "  ".join([name, *(loop.matrix if loop else ())]),
            )
        )
    return "\n".join(" ".join([*(cell.rjust(9) for cell in line[:-1]), " " + line[-1]]) for line in lines)


def _report(resources: Resources, limits: LoopLimits | None) -> KernelReport:
    loop = resources.hot_loop
    return KernelReport(
        registers=resources.registers,
        stack_bytes=resources.stack_bytes,
        shared_bytes=resources.shared_bytes,
        num_warps=resources.num_warps,
        tensor_memory=resources.tensor_memory,
        instructions=resources.instructions,
        scattered_operands=resources.scattered_operands,
        hot_loop=None if loop is None else _report_loop(loop, resources.threads, limits),
        limits=limits,
    )


def _report_loop(loop: InstructionMix, threads: int, limits: LoopLimits | None) -> LoopReport:
    passes, cost = None, None
    if limits is not None and (passes := _passes(loop, threads, limits)):
        cost = round(loop.instructions * threads / (limits.items * passes), 3)
    return LoopReport(
        instructions=loop.instructions,
        matrix=loop.matrix,
        narrow_shared_loads=loop.narrow_shared_loads,
        loaded_bytes_per_thread=loop.global_bytes_per_thread,
        passes=passes,
        instructions_per_item=cost,
    )


def _passes(loop: InstructionMix, threads: int, limits: LoopLimits) -> int | None:
    """How many passes of the source's loop are one of the compiled loop; None if it is no whole number."""
    if limits.num_matrix is not None:
        found = loop.num_matrix / limits.num_matrix
    elif limits.loaded_bytes is not None:
        found = loop.global_bytes_per_thread * threads / limits.loaded_bytes
    else:
        return 1
    return round(found) if round(found) and abs(found - round(found)) <= _PASSES_TOLERANCE else None


def _named(launches: Iterable[KernelLaunch]) -> Iterator[tuple[str, KernelLaunch]]:
    seen: Counter[str] = Counter()
    for launch in launches:
        name = _kernel_name(launch)
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name} {seen[name]}"), launch


def _kernel_name(launch: KernelLaunch) -> str:
    return str(launch.kernel.__name__)
