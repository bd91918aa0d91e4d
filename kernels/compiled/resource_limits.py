"""What the hot loops of our kernels may cost: instructions for each weight or KV element, and matrix
instructions.

A launch belongs to a family, and a family has a limit on each architecture. Some are targets that were set
before the kernels were written; where one is missed, the number reached stands in `_MISSED`. The others lie
just above what was reached, so that nothing gets worse unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Options = Mapping[str, Any]

_TARGETS: dict[str, dict[int, float]] = {
    "decode": {80: 2.8, 90: 2.8, 100: 2.1, 120: 2.1},
    "decode 16": {80: 2.8, 90: 2.8, 100: 2.1, 120: 2.1},
    "grouped nvfp4": {90: 3.3, 100: 1.9, 120: 1.9},
    "grouped mxfp4": {90: 3.0, 100: 1.9, 120: 1.9},
    "large grouped nvfp4": {90: 3.3},
    "large grouped mxfp4": {90: 3.0, 120: 1.9},
    "native": {100: 1.9, 120: 1.9},
    "attention bf16": {90: 2.3},
    "attention fp8": {90: 3.1},
}
_MISSED: dict[tuple[str, int], float] = {
    ("decode 16", 80): 3.1,
    ("decode 16", 90): 3.1,
    ("decode 16", 100): 2.15,
    ("large grouped mxfp4", 90): 3.05,
    ("large grouped mxfp4", 120): 2.3,  # Triton has no FP4 instruction for MXFP4 weights there
}
_REACHED: dict[str, dict[int, float]] = {
    "grouped nvfp4": {80: 2.75},
    "grouped mxfp4": {80: 2.7},
    "large grouped nvfp4": {80: 3.3},
    "large grouped mxfp4": {80: 3.25},
    "narrow large grouped": {80: 3.65, 90: 3.45, 120: 2.65},
    "linear": {80: 3.25, 90: 3.3, 100: 2.2, 120: 2.3},
    "decode fp8": {80: 3.1, 90: 3.05, 100: 1.8, 120: 1.6},
    "linear fp8": {80: 3.85, 90: 3.4, 100: 2.0, 120: 2.85},
    "attention bf16": {80: 2.1, 100: 2.1, 120: 2.0},
    "attention fp8": {100: 3.0, 120: 2.95},
    "prefill bf16": {80: 13.5, 90: 7.4, 100: 7.6, 120: 14.2},
    "prefill fp8": {90: 7.4, 100: 7.5, 120: 20.5},
    "router": {80: 16.5, 90: 14.0, 100: 25.5, 120: 25.5},
}
# Of 64 rows and more, by several warps together.
_WIDE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
_NATIVE = {(100, 16): "UTCOMMA", (100, 32): "UTCQMMA", (120, 16): "OMMA.SF"}


@dataclass(frozen=True)
class LoopRule:
    """matrix: how the opcode begins that must stand in the loop; None where there need be none."""

    max_instructions: float
    matrix: str | None


def loop_rule(name: str, options: Options, format: str, arch: int) -> LoopRule:
    """Of a kernel by its name and the constants of its launch; format: of its weights or cache. KeyError for
    a kernel whose loop has no items."""
    family = loop_family(name, options, format)
    target = _TARGETS.get(family, {}).get(arch)
    limit = _REACHED[family][arch] if target is None else _MISSED.get((family, arch), target)
    return LoopRule(limit, _matrix(family, options, arch))


def loop_family(name: str, options: Options, format: str) -> str:
    """Launches that have one limit."""
    if name in ("_gate_up_kernel", "_down_kernel"):
        return "decode"
    if name == "_fp4_linear_kernel":
        if options["SPLITS"] == 1:
            return "linear"
        return "decode" if options["TOKENS"] <= 8 else "decode 16"
    if name.startswith("_grouped_"):
        return _grouped_family(options, format)
    if name.startswith("_native_"):
        return "native"
    if name == "_fp8_linear_kernel":
        return "decode fp8" if options["SPLITS"] > 1 else "linear fp8"
    families = {"_split_kernel": f"attention {format}", "_prefill_kernel": f"prefill {format}"}
    return families.get(name, "router")


def _grouped_family(options: Options, format: str) -> str:
    if options["SPLITS"] > 1:
        return f"grouped {format}"
    return "narrow large grouped" if options["ROWS"] < 128 else f"large grouped {format}"


def _matrix(family: str, options: Options, arch: int) -> str | None:
    if family == "native":
        return _NATIVE[arch, options["BLOCK_SIZE"]]
    if family == "router":  # float16 activations of sm_100 and sm_120 are multiplied in float32
        return None if arch >= 100 else _WIDE[arch]
    if family.startswith(("decode", "attention")) or options.get("SPLITS", 1) > 1:
        return "HMMA"  # of one warp
    return _WIDE[arch]
