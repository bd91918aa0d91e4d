"""Every kind of benchmark case at a tiny size: our kernels pass the check, and wrong results do not.

On a GPU these run on it; otherwise in the interpreter.
"""

from __future__ import annotations

import pytest
from bench_shapes import TINY
from triton_device import ARCHES, DEVICE

from nybble.kernels.bench.cases import GLM_4_7, BenchCase
from nybble.kernels.bench.inputs import BenchInputs
from nybble.kernels.bench.measured import deviation_of
from nybble.kernels.bench.workload import Workload
from nybble.kernels.bench.workloads import make_workload, meta_workload
from nybble.kernels.triton.launch import recorded_launches

CASES = [
    BenchCase("experts", 1, 2, "nvfp4", "uniform"),
    BenchCase("experts", 1, 9, "mxfp4", "zipf"),
    BenchCase("qkv", 1, 3, "nvfp4"),
    BenchCase("dense_down", 1, 20, "mxfp4"),
    BenchCase("output", 1, 2, "fp8"),
    BenchCase("head", 1, 2, "bf16"),
    BenchCase("router", 1, 5, "fp32"),
    BenchCase("attention", 1, 2, "bf16", context=100),
    BenchCase("prefill_attention", 1, 10, "bf16", context=70),
    BenchCase("norm", 1, 3, "bf16"),
    BenchCase("store_qkv", 1, 5, "bf16"),
    BenchCase("sampling", 1, 2, "fp32"),
]
FP8_CACHE = [
    BenchCase("attention", 1, 2, "fp8", context=100),
    BenchCase("store_qkv", 1, 5, "fp8"),
]
CONVERTING = [arch for arch in ARCHES if arch >= 90]


def workload(case: BenchCase, arch: int = ARCHES[0]) -> Workload:
    return make_workload(case, TINY, BenchInputs(DEVICE, arch))


def check(made: Workload) -> None:
    """Right as it is, and wrong with one number off, as a slip at a border would make it."""
    found = deviation_of(made.run, made.output, made.judge)
    assert made.tolerance.admits(found), found
    output = made.output(made.run()).clone()
    output.view(-1)[-1] += 7
    assert not made.tolerance.admits(made.judge(output))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_our_kernels_are_right(case: BenchCase) -> None:
    check(workload(case))


@pytest.mark.skipif(not CONVERTING, reason="this GPU has no conversion from E4M3")
@pytest.mark.parametrize("case", FP8_CACHE, ids=lambda case: case.name)
def test_an_fp8_cache(case: BenchCase) -> None:
    check(workload(case, CONVERTING[0]))


@pytest.mark.skipif(100 not in ARCHES, reason="needs the interpreter or a GPU of compute capability 10.0")
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.name)
def test_float16_operands(case: BenchCase) -> None:
    check(workload(case, 100))


def test_an_architecture_without_fp8_conversion() -> None:
    with pytest.raises(ValueError, match="sm_80 cannot read an FP8 cache"):
        meta_workload(FP8_CACHE[0], TINY, 80).run()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peers_that_are_there_agree(case: BenchCase) -> None:
    made = workload(case)
    for peer in made.peers:
        if peer.name.startswith("torch"):
            found = made.judge(peer.prepare()())
            assert (peer.tolerance or made.tolerance).admits(found), (peer.name, found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_launches_are_recorded_with_no_memory(case: BenchCase) -> None:
    with recorded_launches() as launches:
        meta_workload(case, GLM_4_7, 90).run()
    assert bool(launches) == (case.op != "head")
