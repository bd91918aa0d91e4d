"""Layouts as Triton prints them, right and wrong; and that a real kernel's are found."""

from __future__ import annotations

from pathlib import Path

import pytest
from aot_process import call_ahead_of_time

from nybble.kernels.compiled.packed_operands import scattered_operands

CACHE = Path(__file__).parents[3] / "build" / "triton-cache"
CODE = """#blocked = #ttg.blocked<{{sizePerThread = [1, 4], threadsPerWarp = [8, 4], order = [1, 0]}}>
#flat = #ttg.blocked<{{sizePerThread = [4, 1], threadsPerWarp = [8, 4], order = [0, 1]}}>
#near = #ttg.linear<{{register = [[0, 1], [8, 0], [0, 2]], lane = [[0, 4], [0, 8]], block = []}}>
#far = #ttg.linear<{{register = [[0, 4], [0, 8], [0, 1]], lane = [[1, 0], [2, 0]], block = []}}>
#none = #ttg.linear<{{register = [], lane = [[1, 0], [2, 0]], block = []}}>
    %w = tt.elementwise_inline_asm "{{ .reg .b32 a<2>; }}" {{constraints = "=r,r", packed_element = {pack} : \
i32, pure = true}} %codes, %scales : {operands} -> tensor<64x16xbf16, #near> loc(#loc1)
"""
DOT = "#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>"


def found(*layouts: str, pack: int = 2) -> list[str]:
    operands = ", ".join(f"tensor<64x16xi16, {layout}>" for layout in layouts)
    return scattered_operands(CODE.format(pack=pack, operands=operands))


@pytest.mark.parametrize("layout", ["#blocked", "#near", DOT])
def test_neighbours(layout: str) -> None:
    assert found(layout, "#near") == []


@pytest.mark.parametrize(
    ("layout", "begin"), [("#flat", "#ttg.blocked"), ("#far", "#ttg.linear"), ("#none", "#")]
)
def test_what_is_not_together_is_named(layout: str, begin: str) -> None:
    (fault,) = found("#near", layout)
    assert fault.startswith(f"64x16xi16 in {begin}")


def test_four_at_a_time() -> None:
    assert found("#blocked", pack=4) == []
    assert len(found("#near", DOT, pack=4)) == 2


def test_a_layout_that_is_not_known_is_a_fault() -> None:
    assert len(found("#ttg.some_new<{a = 1}>")) == 1


def test_one_at_a_time_may_lie_anywhere() -> None:
    assert found("#far", pack=1) == []


@pytest.mark.parametrize("is_packed", [True, False])
def test_compiled_kernel(is_packed: bool) -> None:
    """A kernel whose assembly takes two elements of a row, or two that stand below each other."""
    faults = call_ahead_of_time("aot_kernels", "paired_faults", is_packed, cache=CACHE)
    assert bool(faults) is not is_packed
