from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest

from nybble.kernels.compiled.resource_report import Case, LoopLimits, Report, ReportError, report_case, table
from nybble.kernels.compiled.sass import InstructionMix, Resources
from nybble.kernels.triton.launch import KernelLaunch, launch

LOOP = InstructionMix(100, {"HGMMA.64x16x16.F32.BF16": 8, "LDGSTS.E.BYPASS.128": 9, "LDS.U8": 3})
RESOURCES = Resources(
    registers=96,
    stack_bytes=0,
    shared_bytes=4096,
    static_shared_bytes=1024,
    num_warps=4,
    tensor_memory=0,
    kernel=InstructionMix(250, {}),
    loops=(LOOP,),
    hot_loop=LOOP,
)
LIMITS = LoopLimits(items=6400, max_instructions=2.5)


@dataclass(frozen=True)
class Kernel:
    __name__: str


def case(*kernels: str, **loops: LoopLimits) -> Case:
    def run() -> None:
        for name in kernels:
            launch(Kernel(name), (1,))

    return Case("case", run, loops)


def cost(limits: LoopLimits) -> tuple[int | None, float | None]:
    """Passes of the hot loop, and its instructions for an item."""
    loop = report_case(case("one", one=limits), lambda _: RESOURCES)["case: one"].hot_loop
    assert loop is not None
    return loop.passes, loop.instructions_per_item


def test_every_kernel_of_a_case_is_reported() -> None:
    asked: list[KernelLaunch] = []

    def resources_of(recorded: KernelLaunch) -> Resources:
        asked.append(recorded)
        return replace(RESOURCES, registers=len(asked))

    kernels = report_case(case("one", "two", "one", two=LIMITS), resources_of)
    assert {name: kernel.registers for name, kernel in kernels.items()} == {
        "case: one": 1,
        "case: two": 2,
        "case: one 2": 3,
    }
    assert [kernel.limits for kernel in kernels.values()] == [None, LIMITS, None]


def test_a_kernel_with_limits_must_be_launched() -> None:
    with pytest.raises(ReportError, match="case does not launch two"):
        report_case(case("one", two=LIMITS), lambda _: RESOURCES)


def test_a_kernel_that_does_not_compile_is_named() -> None:
    def refuse(recorded: KernelLaunch) -> Resources:
        raise ValueError("too many warps")

    with pytest.raises(ReportError, match="case: one: ValueError: too many warps"):
        report_case(case("one"), refuse)


def test_instructions_of_all_threads_are_shared_by_the_items() -> None:
    assert cost(LIMITS) == (1, 100 * 128 / 6400)


def test_passes_are_told_by_matrix_instructions() -> None:
    assert cost(replace(LIMITS, num_matrix=8)) == (1, 2.0)
    assert cost(replace(LIMITS, num_matrix=4)) == (2, 1.0)
    assert cost(replace(LIMITS, num_matrix=5)) == (None, None)


def test_passes_are_told_by_loaded_bytes() -> None:
    loaded = 9 * 16 * 128
    assert cost(replace(LIMITS, loaded_bytes=loaded)) == (1, 2.0)
    assert cost(replace(LIMITS, loaded_bytes=loaded // 3)) == (3, 0.667)
    assert cost(replace(LIMITS, loaded_bytes=loaded * 9 // 10)) == (1, 2.0)
    assert cost(replace(LIMITS, loaded_bytes=loaded * 2 // 3)) == (None, None)
    assert cost(replace(LIMITS, loaded_bytes=loaded * 10)) == (None, None)


def test_a_kernel_without_a_loop() -> None:
    kernels = report_case(case("one", one=LIMITS), lambda _: replace(RESOURCES, loops=(), hot_loop=None))
    assert kernels["case: one"].hot_loop is None


def test_the_golden_file_holds_what_is_worth_a_look_in_a_diff() -> None:
    report = Report("3.9.0", 90, report_case(case("one", one=LIMITS), lambda _: RESOURCES))
    assert json.loads(report.to_json()) == {
        "triton": "3.9.0",
        "arch": 90,
        "kernels": {
            "case: one": {
                "registers": 96,
                "stack_bytes": 0,
                "shared_bytes": 4096,
                "num_warps": 4,
                "tensor_memory": 0,
                "instructions": 250,
                "scattered_operands": [],
                "hot_loop": {
                    "instructions": 100,
                    "matrix": {"HGMMA.64x16x16.F32.BF16": 8},
                    "narrow_shared_loads": {"LDS.U8": 3},
                    "loaded_bytes_per_thread": 144,
                    "passes": 1,
                    "instructions_per_item": 2.0,
                },
                "limits": {
                    "items": 6400,
                    "max_instructions": 2.5,
                    "matrix": None,
                    "num_matrix": None,
                    "loaded_bytes": None,
                },
            }
        },
    }


def test_table() -> None:
    kernels = report_case(case("one", "two", one=LIMITS), lambda _: RESOURCES)
    head, one, two = table(Report("3.9.0", 90, kernels)).splitlines()
    assert head.split() == ["registers", "stack", "shared", "warps", "loop", "per", "item", "limit", "sm_90"]
    assert one.split()[:7] == ["96", "0", "4096", "4", "100", "2.00", "2.50"]
    assert one.endswith("case: one  HGMMA.64x16x16.F32.BF16")
    assert two.split()[:7] == ["96", "0", "4096", "4", "100", "-", "-"]
