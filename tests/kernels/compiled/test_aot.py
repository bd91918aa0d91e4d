from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aot_process import call_ahead_of_time

from nybble.kernels.compiled.aot import compile_launch
from nybble.kernels.triton.launch import KernelLaunch

MEASURED = [
    ("spilled", 80),
    ("summed", 80),
    ("dense_matmul", 80),
    ("dense_matmul", 90),
    ("dense_matmul", 100),
    ("dense_matmul", 120),
    ("packed_matmul", 90),
]
Measured = Callable[[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def kinds(cache: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # what a launch asks for by name must win
        found: dict[str, Any] = call_ahead_of_time("aot_kernels", "kinds_found", 90, cache=cache)
    return found


@pytest.fixture(scope="module")
def measured(cache: Path) -> Measured:
    answers = call_ahead_of_time("aot_kernels", "all_measured", MEASURED, cache=cache)
    return lambda name, arch: answers[MEASURED.index((name, arch))]


def test_arguments_have_the_types_of_a_launch(kinds: dict[str, Any]) -> None:
    assert kinds["signature"] == {
        "aligned": "*fp32",
        "shifted": "*fp32",
        "absent": "constexpr",
        "one": "constexpr",
        "many": "i32",
        "odd": "i32",
        "long": "i64",
        "half": "fp32",
        "switch": "u1",
        "plain": "i32",
        "LENGTH": "constexpr",
    }
    assert kinds["constants"] == {"2": None, "3": 1, "10": 32}


def test_what_is_divisible_by_sixteen_is_known(kinds: dict[str, Any]) -> None:
    aligned, many, long = 0, 4, 6  # not `shifted`, one float on, and not `plain`, which is not looked at
    assert kinds["divisible"] == [aligned, many, long]


def test_a_launch_by_triton_would_run_the_same_kernel(kinds: dict[str, Any]) -> None:
    assert kinds["hash"] == kinds["hash_of_a_launch"]


def test_spills_are_seen(measured: Measured) -> None:
    spilled, summed = measured("spilled", 80), measured("summed", 80)
    assert spilled["registers"] <= 32 and spilled["stack_bytes"] > 0 and spilled["spills"]
    assert summed["stack_bytes"] == 0 and summed["spills"] == {}


def test_options_of_the_launch_count(measured: Measured) -> None:
    assert measured("spilled", 80)["threads"] == 32
    assert measured("summed", 80)["threads"] == 128


@pytest.mark.parametrize(("arch", "name"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")])
def test_each_architecture_has_its_matrix_instruction(measured: Measured, arch: int, name: str) -> None:
    matmul = measured("dense_matmul", arch)
    assert {opcode.partition(".")[0] for opcode in matmul["matrix"]} == {name}
    assert matmul["stack_bytes"] == 0 and matmul["shared_bytes"] > 0
    assert (matmul["tensor_memory"] > 0) == (arch == 100)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_hot_loop_loads_one_tile(measured: Measured, arch: int) -> None:
    tile_bytes = 2 * (16 + 128) * 64  # bf16: 16 tokens and 128 rows of 64 columns
    matmul = measured("dense_matmul", arch)
    assert matmul["global_bytes_per_thread"] * matmul["threads"] == tile_bytes


def test_bytewise_shared_loads_are_seen(measured: Measured) -> None:
    assert measured("packed_matmul", 90)["narrow_shared_loads"]["LDS.U8"] > 0
    assert measured("dense_matmul", 90)["narrow_shared_loads"] == {}


def test_a_kernel_that_is_interpreted_cannot_be_compiled() -> None:
    def interpreted(pointer: torch.Tensor) -> None: ...

    with pytest.raises(TypeError, match="TRITON_INTERPRET"):
        compile_launch(KernelLaunch(interpreted, (1,), (torch.empty(1, device="meta"),), {}), 90)
