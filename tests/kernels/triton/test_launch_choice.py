"""The code's choice, and that a table's entry takes its place at its own shape only."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels.triton.expert_decode import expert_down_launch, expert_gate_up_launch
from nybble.kernels.triton.expert_grouped import expert_grouped_launch
from nybble.kernels.triton.fp4_linear import fp4_linear_launch
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.fp8_linear import fp8_linear_launch
from nybble.kernels.triton.fp8_matrix import Fp8Matrix
from nybble.kernels.triton.launch_choice import TUNABLE_OPS, LaunchChoice
from nybble.kernels.triton.launch_table import LaunchKey, LaunchTable

ARCH = 90
ROWS, WIDTH = 3072, 5120


def fp4(block_size: int = 16) -> Fp4Matrix:
    codes = torch.empty(ROWS, WIDTH // 2, dtype=torch.uint8, device="meta")
    words = torch.empty(ROWS // 16, WIDTH // 256, 1024 // block_size, dtype=torch.int32, device="meta")
    return Fp4Matrix(codes, words, torch.empty(ROWS, device="meta"), block_size, False, (ROWS, WIDTH))


def fp8() -> Fp8Matrix:
    codes = torch.empty(ROWS, WIDTH, dtype=torch.uint8, device="meta")
    return Fp8Matrix(codes, torch.empty(ROWS, device="meta"), False, (ROWS, WIDTH))


CHOICES = {
    "fp4_linear": lambda choice: choice.fp4_linear(5, fp4()),
    "fp8_linear": lambda choice: choice.fp8_linear(5, fp8()),
    "expert_gate_up": lambda choice: choice.expert_gate_up(5, 40, fp4()),
    "expert_down": lambda choice: choice.expert_down(5, 8, fp4()),
    "grouped_gate_up": lambda choice: choice.grouped_gate_up(8, fp4()),
    "grouped_down": lambda choice: choice.grouped_down(8, fp4()),
}
DEFAULTS = {
    "fp4_linear": fp4_linear_launch(5, ROWS, WIDTH, ARCH),
    "fp8_linear": fp8_linear_launch(5, ROWS, WIDTH, ARCH),
    "expert_gate_up": expert_gate_up_launch(40, WIDTH, ROWS // 2, ARCH),
    "expert_down": expert_down_launch(5, 8, ROWS, ARCH),
    "grouped_gate_up": expert_grouped_launch(8, ROWS, WIDTH, ARCH),
    "grouped_down": expert_grouped_launch(8, ROWS, WIDTH, ARCH),
}


def table(op: str, **changes: int) -> LaunchTable:
    size = {"block_m": 8} if op.startswith("grouped") else {"tokens": 8}
    shape = {"rows": ROWS, "width": WIDTH} | size | changes
    key = LaunchKey.of(op, ARCH, "fp8" if op == "fp8_linear" else "nvfp4", shape)
    return LaunchTable({key: {"num_stages": 7}})


def test_every_op_that_can_be_tuned_is_here() -> None:
    assert CHOICES.keys() == DEFAULTS.keys() == TUNABLE_OPS.keys()
    assert {op: type(launch) for op, launch in DEFAULTS.items()} == TUNABLE_OPS


@pytest.mark.parametrize("op", CHOICES)
def test_without_a_table_the_code_chooses(op: str) -> None:
    assert CHOICES[op](LaunchChoice(ARCH)) == DEFAULTS[op]


@pytest.mark.parametrize("op", CHOICES)
def test_what_was_measured_takes_its_place(op: str) -> None:
    assert CHOICES[op](LaunchChoice(ARCH, table=table(op))).num_stages == 7


@pytest.mark.parametrize("change", ["rows", "width", "size"])
@pytest.mark.parametrize("op", CHOICES)
def test_at_its_own_shape_only(op: str, change: str) -> None:
    name = change if change != "size" else "block_m" if op.startswith("grouped") else "tokens"
    assert CHOICES[op](LaunchChoice(ARCH, table=table(op, **{name: 64}))) == DEFAULTS[op]


def test_of_its_own_format_only() -> None:
    choice = LaunchChoice(ARCH, table=table("fp4_linear"))
    assert choice.fp4_linear(5, fp4(32)) == fp4_linear_launch(5, ROWS, WIDTH, ARCH)
