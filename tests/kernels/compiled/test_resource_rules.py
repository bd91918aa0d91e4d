from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from nybble.kernels.compiled.resource_report import KernelReport, LoopLimits, LoopReport, Report
from nybble.kernels.compiled.resource_rules import compare

LIMITS = LoopLimits(items=6400, max_instructions=2.0, matrix="HGMMA")
LOOP = LoopReport(
    instructions=100,
    matrix={"HGMMA.64x16x16.F32.BF16": 8},
    narrow_shared_loads={},
    loaded_bytes_per_thread=144,
    passes=1,
    instructions_per_item=2.0,
)
KERNEL = KernelReport(
    registers=100,
    stack_bytes=0,
    shared_bytes=101_376,
    num_warps=4,
    tensor_memory=0,
    instructions=250,
    scattered_operands=(),
    hot_loop=LOOP,
    limits=LIMITS,
)


def report(kernel: KernelReport, triton: str = "3.9.0", arch: int = 90) -> Report:
    return Report(triton, arch, {"case: kernel": kernel})


GOLDEN = json.loads(report(KERNEL).to_json())


def faults(kernel: KernelReport, golden: Any = GOLDEN, arch: int = 90) -> list[str]:
    comparison = compare(report(kernel, arch=arch), golden)
    assert comparison.notes == []
    return comparison.faults


def loop_faults(limits: LoopLimits | None = LIMITS, **changes: Any) -> list[str]:
    return faults(replace(KERNEL, hot_loop=replace(LOOP, **changes), limits=limits))


def test_a_kernel_that_keeps_the_rules() -> None:
    assert faults(KERNEL) == []
    assert faults(KERNEL, arch=120) == []


def test_elements_that_are_no_neighbours() -> None:
    (fault,) = faults(replace(KERNEL, scattered_operands=("64x16xi16 in #ttg.linear<{}>",)))
    assert fault.endswith("and computes wrong numbers: 64x16xi16 in #ttg.linear<{}>")


def test_a_spill() -> None:
    assert faults(replace(KERNEL, stack_bytes=8)) == ["sm_90, case: kernel: spills 8 bytes of each thread"]


@pytest.mark.parametrize(("arch", "most"), [(80, 166_912), (90, 232_448), (100, 232_448), (120, 101_376)])
def test_more_shared_memory_than_a_block_can_have(arch: int, most: int) -> None:
    assert faults(replace(KERNEL, shared_bytes=most), arch=arch) == []
    (fault,) = faults(replace(KERNEL, shared_bytes=most + 1), arch=arch)
    assert fault == f"sm_{arch}, case: kernel: {most + 1} bytes of shared memory, a block has {most}"


def test_narrow_loads_in_the_hot_loop_with_limits_or_without() -> None:
    for limits in (LIMITS, None):
        (fault,) = loop_faults(limits, narrow_shared_loads={"LDS.U8": 64})
        assert "narrow loads" in fault and "'LDS.U8': 64" in fault


def test_a_missing_matrix_instruction() -> None:
    (fault,) = loop_faults(matrix={"HMMA.16816.F32.BF16": 32})
    assert "no HGMMA in the hot loop" in fault
    assert loop_faults(replace(LIMITS, matrix=None), matrix={}) == []


def test_too_many_instructions_for_an_item() -> None:
    assert loop_faults(instructions_per_item=2.001) == [
        "sm_90, case: kernel: 2.001 instructions an item, at most 2.0 allowed"
    ]


def test_a_cost_that_cannot_be_told() -> None:
    (fault,) = loop_faults(passes=None, instructions_per_item=None)
    assert "cannot be told" in fault
    assert loop_faults(None, passes=None, instructions_per_item=None) == []


def test_a_kernel_with_limits_and_no_loop() -> None:
    assert faults(replace(KERNEL, hot_loop=None)) == ["sm_90, case: kernel: has no loop"]
    assert faults(replace(KERNEL, hot_loop=None, limits=None)) == []


def test_registers_may_grow_by_a_tenth() -> None:
    assert faults(replace(KERNEL, registers=110)) == []
    assert faults(replace(KERNEL, registers=50)) == []
    assert faults(replace(KERNEL, registers=111)) == [
        "sm_90, case: kernel: 111 registers, 100 in the golden file"
    ]


def test_kernels_must_be_those_of_the_golden_file() -> None:
    other = json.loads(Report("3.9.0", 90, {"case: other": KERNEL}).to_json())
    assert faults(KERNEL, other) == [
        "sm_90, case: other: only in the golden file",
        "sm_90, case: kernel: not in the golden file",
    ]


def test_no_golden_file() -> None:
    (fault,) = faults(KERNEL, None)
    assert "no golden file" in fault


def test_another_triton_is_held_to_what_must_always_hold_and_says_so() -> None:
    spilling = replace(KERNEL, registers=200, stack_bytes=8)
    comparison = compare(report(spilling, triton="3.6.0"), GOLDEN)
    assert comparison.faults == ["sm_90, case: kernel: spills 8 bytes of each thread"]
    (note,) = comparison.notes
    assert "registers were not compared" in note and "3.9.0" in note and "3.6.0" in note
