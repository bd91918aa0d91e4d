"""Which limit a launch has."""

from __future__ import annotations

from typing import Any

import pytest

from nybble.kernels.compiled.resource_limits import LoopRule, loop_family, loop_rule

DECODE = {"SPLITS": 4, "TOKENS": 8, "ROWS": 32, "BLOCK_SIZE": 16}
TILE = {"SPLITS": 1, "TOKENS": 16, "ROWS": 256, "BLOCK_SIZE": 16}


@pytest.mark.parametrize(
    ("name", "options", "format", "family"),
    [
        ("_gate_up_kernel", DECODE, "nvfp4", "decode"),
        ("_fp4_linear_kernel", DECODE, "mxfp4", "decode"),
        ("_fp4_linear_kernel", DECODE | {"TOKENS": 16}, "mxfp4", "decode 16"),
        ("_fp4_linear_kernel", TILE, "mxfp4", "linear"),
        ("_grouped_down_kernel", TILE, "nvfp4", "large grouped nvfp4"),
        ("_grouped_down_kernel", TILE | {"TOKENS": 64}, "mxfp4", "large grouped mxfp4"),
        ("_grouped_gate_up_kernel", DECODE | {"ROWS": 64}, "nvfp4", "grouped nvfp4"),
        ("_grouped_gate_up_kernel", TILE | {"ROWS": 64, "SPLITS": 4}, "mxfp4", "grouped mxfp4"),
        ("_grouped_gate_up_kernel", TILE | {"ROWS": 64, "TOKENS": 32}, "nvfp4", "narrow large grouped"),
        ("_native_down_kernel", TILE, "nvfp4", "native"),
        ("_fp8_linear_kernel", DECODE, "fp8", "decode fp8"),
        ("_fp8_linear_kernel", TILE, "fp8", "linear fp8"),
        ("_split_kernel", {}, "bf16", "attention bf16"),
        ("_prefill_kernel", {}, "fp8", "prefill fp8"),
        ("_matrix_logits_kernel", {}, "fp32", "router"),
    ],
)
def test_families(name: str, options: dict[str, Any], format: str, family: str) -> None:
    assert loop_family(name, options, format) == family


@pytest.mark.parametrize(
    ("name", "options", "format", "arch", "rule"),
    [
        ("_split_kernel", {"ROWS": 16}, "bf16", 90, LoopRule(2.3, "HMMA")),
        ("_split_kernel", {"ROWS": 16}, "fp8", 90, LoopRule(3.1, "HMMA")),
        ("_grouped_down_kernel", TILE, "nvfp4", 90, LoopRule(3.3, "HGMMA")),
        ("_grouped_down_kernel", DECODE, "mxfp4", 90, LoopRule(3.0, "HMMA")),
        ("_grouped_down_kernel", DECODE, "nvfp4", 120, LoopRule(1.9, "HMMA")),
        ("_native_linear_kernel", TILE, "nvfp4", 100, LoopRule(1.9, "UTCOMMA")),
        ("_native_linear_kernel", TILE | {"BLOCK_SIZE": 32}, "mxfp4", 100, LoopRule(1.9, "UTCQMMA")),
        ("_native_linear_kernel", TILE, "nvfp4", 120, LoopRule(1.9, "OMMA.SF")),
        ("_gate_up_kernel", DECODE, "nvfp4", 100, LoopRule(2.1, "HMMA")),
    ],
)
def test_targets(name: str, options: dict[str, Any], format: str, arch: int, rule: LoopRule) -> None:
    assert loop_rule(name, options, format, arch) == rule
