"""The compiled code of what GLM-4.7 launches, against the golden files in tests/kernels/golden.

Where a kernel is meant to have changed:

    python -m nybble.kernels.compiled.resource_cases tests/kernels/golden --update
"""

from __future__ import annotations

from pathlib import Path

import pytest
from aot_process import run_ahead_of_time

from nybble.kernels.compiled.resource_cases import cases
from nybble.kernels.compiled.resource_check import ARCHES
from nybble.kernels.triton.launch import recorded_launches

GOLDEN = Path(__file__).parents[1] / "golden"
CACHE = Path(__file__).parents[3] / "build" / "triton-cache"


@pytest.mark.parametrize("arch", ARCHES)
def test_compiled_code(arch: int) -> None:
    done = run_ahead_of_time(
        "-m", "nybble.kernels.compiled.resource_cases", str(GOLDEN), "--arch", str(arch), cache=CACHE
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arch", ARCHES)
def test_each_kernel_is_compiled_once(arch: int) -> None:
    found = cases(arch)
    assert len({case.name for case in found}) == len(found)
    launches = []
    for case in found:
        with recorded_launches() as recorded:
            case.run()
        launches += recorded
    assert len(launches) == len(found)
    kinds = {(launch.kernel.__name__, str(sorted(launch.options.items(), key=str))) for launch in launches}
    assert len(kinds) > 0.8 * len(found)


def test_every_kernel_of_a_layer_is_there() -> None:
    names = set()
    for case in cases(90):
        with recorded_launches() as recorded:
            case.run()
        names |= {launch.kernel.__name__ for launch in recorded}
    assert names >= {
        "_chunk_kernel",
        "_combine_kernel",
        "_down_kernel",
        "_expert_slots_kernel",
        "_fp4_linear_kernel",
        "_fp8_linear_kernel",
        "_gate_up_kernel",
        "_grouped_down_kernel",
        "_grouped_gate_up_kernel",
        "_matrix_logits_kernel",
        "_merge_kernel",
        "_pick_kernel",
        "_prefill_kernel",
        "_qkv_kernel",
        "_residual_rms_norm_kernel",
        "_router_choice_kernel",
        "_silu_mul_kernel",
        "_split_kernel",
        "_vector_logits_kernel",
    }
