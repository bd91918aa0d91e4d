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
    "narrow grouped": {90: 3.0, 100: 1.9, 120: 1.9},
    "native": {100: 1.9, 120: 1.9},
    "attention bf16": {90: 2.3},
    "attention fp8": {90: 3.1},
}
_MISSED: dict[tuple[str, int], float] = {
    ("decode", 80): 2.86,  # MXFP4; NVFP4 2.80
    ("decode", 90): 2.84,  # MXFP4; NVFP4 2.78
    ("decode 16", 80): 3.23,
    ("decode 16", 90): 3.18,
    ("decode 16", 100): 2.32,
    ("decode 16", 120): 2.18,
    ("grouped mxfp4", 100): 2.08,  # 2.07 where a rank's expert is too narrow for FP4 instructions
    ("narrow grouped", 90): 3.98,  # NVFP4 3.63
    ("narrow grouped", 120): 2.07,
}
_REACHED: dict[str, dict[int, float]] = {
    "grouped nvfp4": {80: 2.5},
    "grouped mxfp4": {80: 2.55},
    "narrow grouped": {80: 3.2},
    "large grouped": {80: 3.3, 90: 3.45, 120: 2.3},
    "narrow large grouped": {80: 5.9, 90: 4.25, 120: 3.9},
    "linear": {80: 3.35, 90: 3.5, 100: 2.35, 120: 2.35},
    "decode fp8": {80: 3.0, 90: 3.05, 100: 1.85, 120: 1.6},
    "linear fp8": {80: 5.5, 90: 3.4, 100: 2.0, 120: 2.85},
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
    size = "grouped" if options["TOKENS"] <= 16 else "large grouped"
    if options["SPLITS"] == 1 and options["ROWS"] < 128:
        return f"narrow {size}"
    return f"{size} {format}" if size == "grouped" else size


def _matrix(family: str, options: Options, arch: int) -> str | None:
    if family == "native":
        return _NATIVE[arch, options["BLOCK_SIZE"]]
    if family == "router":  # float16 activations of sm_100 and sm_120 are multiplied in float32
        return None if arch >= 100 else _WIDE[arch]
    if family.startswith(("decode", "attention")) or options.get("SPLITS", 1) > 1:
        return "HMMA"  # of one warp
    return _WIDE[arch]
