"""The benchmark with no GPU: items of whole launches, and rows made of compiled code."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from aot_process import run_ahead_of_time

from nybble.kernels.bench.cases import GLM_4_7, BenchCase
from nybble.kernels.bench.routing import expert_counts, expert_ids
from nybble.kernels.bench.static import case_launches, num_items
from nybble.kernels.compiled.loop_pass import kernel_name

EXPERT = 3 * 192 * 5120  # weights, on one of eight ranks


def items(case: BenchCase, arch: int = 90) -> dict[str, float]:
    return {
        kernel_name(launch): num_items(case, GLM_4_7, launch)
        for launch in case_launches(case, GLM_4_7, arch)
        if any(
            word in kernel_name(launch)
            for word in ("gate_up", "down", "linear", "split", "prefill", "matrix")
        )
    }


def test_a_pair_of_token_and_expert_reads_the_expert() -> None:
    found = items(BenchCase("experts", 8, 3, "nvfp4", "uniform"))
    assert found == {"_gate_up_kernel": 3 * 9 * EXPERT * 2 / 3, "_down_kernel": 3 * 9 * EXPERT / 3}


@pytest.mark.parametrize(("arch", "prefix"), [(90, "_grouped"), (100, "_native")])
def test_a_tile_of_tokens_reads_its_expert(arch: int, prefix: str) -> None:
    case = BenchCase("experts", 8, 512, "nvfp4", "zipf")
    (block,) = {
        launch.options["TOKENS"]
        for launch in case_launches(case, GLM_4_7, arch)
        if kernel_name(launch).startswith(prefix) and "linear" not in kernel_name(launch)
    }
    counts = expert_counts(expert_ids(512, 160, 8, "zipf"), 160)
    tiles = sum(math.ceil(count / block) for count in counts)
    found = items(case, arch)
    assert found[f"{prefix}_gate_up_kernel"] == tiles * EXPERT * 2 / 3
    assert found[f"{prefix}_down_kernel"] == tiles * EXPERT / 3


@pytest.mark.parametrize(("format", "name"), [("nvfp4", "_fp4_linear_kernel"), ("fp8", "_fp8_linear_kernel")])
def test_a_matrix_is_read_for_each_block_of_tokens(format: str, name: str) -> None:
    case = BenchCase("qkv", 1, 100, format)
    (launch,) = case_launches(case, GLM_4_7, 90)
    blocks = math.ceil(100 / launch.options["TOKENS"])
    assert items(case)[name] == blocks * 14336 * 5120


def test_decode_reads_the_cache_once() -> None:
    found = items(BenchCase("attention", 8, 4, "bf16", context=8192))
    assert found["_split_kernel"] == 2 * 4 * 8192 * 128


def test_prefill_reads_what_each_tile_of_queries_sees() -> None:
    case = BenchCase("prefill_attention", 8, 4096, "bf16", context=32768)
    (launch,) = case_launches(case, GLM_4_7, 90)
    tokens_of_a_tile = launch.options["ROWS"] / 12
    seen_on_average = 32768 - 4096 / 2 + 0.5
    assert items(case)["_prefill_kernel"] == pytest.approx(
        4096 / tokens_of_a_tile * seen_on_average * 2 * 128
    )


def test_rows_of_compiled_code(tmp_path: Path) -> None:
    options = ("--op", "norm", "qkv", "head", "--tp", "1", "8", "--tokens", "1", "--format", "nvfp4", "bf16")
    program = ("-m", "nybble.kernels.bench.program", "--static", "--gpu", "h200", "--processes", "1")
    cache = Path(__file__).parents[3] / "build" / "triton-cache"
    done = run_ahead_of_time(*program, *options, "--out", str(tmp_path / "out"), cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels are compiled for H200, times are modelled" in done.stdout
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["name"]: row for row in document["rows"]}
    qkv, norm = rows["qkv nvfp4, tp 8, tokens 1"], rows["norm bf16, tp 1, tokens 1"]
    assert {row["kind"] for row in rows.values()} == {"modelled"}
    (kernel,) = qkv["kernels"]
    assert kernel["name"] == "_fp4_linear_kernel" and 2 < kernel["instructions_per_item"] < 4
    assert kernel["stack_bytes"] == 0 and kernel["registers"] > 30
    assert (
        0
        < norm["roof_us"]
        < norm["median_us"]
        < qkv["median_us"]
        < rows["qkv nvfp4, tp 1, tokens 1"]["median_us"]
    )
    assert {omission["reason"] for omission in document["omissions"]} == {
        "no kernel of ours: it is torch's own product"
    }
    assert "modelled" in (tmp_path / "out" / "summary.md").read_text()
