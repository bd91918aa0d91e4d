"""How much work one pass of a kernel's hot loop is, from the constants that it was launched with.

Items are weights, or elements of keys and values: what the kernels must read however they compute. The bytes
that a block loads in a pass tell how many passes a compiled loop does at once, see `resource_report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nybble.kernels.triton.launch import KernelLaunch

# Columns that a warp's loop takes at a time.
_FP4_STEP = 256
_FP8_STEP = 128
_OPERAND_BYTES = 2

Options = Mapping[str, Any]


@dataclass(frozen=True)
class LoopPass:
    """Of a block."""

    items: int
    loaded_bytes: int


def loop_pass(launch: KernelLaunch) -> LoopPass | None:
    """None of kernels whose hot loop reads neither weights nor a cache."""
    name, options = kernel_name(launch), launch.options
    if name == "_gate_up_kernel":  # ROWS of gate and as many of up
        return _fp4_pass(options, 2 * options["ROWS"])
    if name in ("_down_kernel", "_fp4_linear_kernel", "_grouped_gate_up_kernel", "_grouped_down_kernel"):
        return _fp4_pass(options, options["ROWS"])
    if name.startswith("_native_"):
        return _native_pass(options)
    if name == "_fp8_linear_kernel":
        return _fp8_pass(options)
    if name in ("_split_kernel", "_prefill_kernel"):
        return _attention_pass(options, _item_bytes(launch))
    return _router_pass(options) if name == "_matrix_logits_kernel" else None


def kernel_name(launch: KernelLaunch) -> str:
    return str(launch.kernel.__name__)


def argument(launch: KernelLaunch, name: str) -> Any:
    """That the kernel calls `name`."""
    return launch.arguments[launch.kernel.arg_names.index(name)]


def _fp4_pass(options: Options, rows: int) -> LoopPass:
    items = rows * _FP4_STEP
    activations = options["TOKENS"] * _FP4_STEP * _OPERAND_BYTES
    loaded = items // 2 + items // options["BLOCK_SIZE"] + activations
    return LoopPass(options["SPLITS"] * items, options["SPLITS"] * loaded)


def _native_pass(options: Options) -> LoopPass:
    """Activations are NVFP4 with NVFP4 weights, MXFP8 with MXFP4."""
    width, block_size = options["WIDTH"], options["BLOCK_SIZE"]
    items, activations = options["ROWS"] * width, options["TOKENS"] * width
    codes = items // 2 + (activations // 2 if block_size == 16 else activations)
    return LoopPass(items, codes + (items + activations) // block_size)


def _fp8_pass(options: Options) -> LoopPass:
    items = options["ROWS"] * _FP8_STEP
    loaded = items + options["TOKENS"] * _FP8_STEP * _OPERAND_BYTES
    return LoopPass(options["SPLITS"] * items, options["SPLITS"] * loaded)


def _attention_pass(options: Options, item_bytes: int) -> LoopPass:
    items = 2 * options["TILE"] * options["HEAD_DIM"]
    return LoopPass(items, items * item_bytes)


def _item_bytes(launch: KernelLaunch) -> int:
    """Of the cache."""
    keys: Tensor = argument(launch, "keys_ptr")
    return keys.element_size()


def _router_pass(options: Options) -> LoopPass:
    items = options["BLOCK_E"] * options["BLOCK_K"]
    return LoopPass(items, 4 * items + options["BLOCK_T"] * options["BLOCK_K"] * _OPERAND_BYTES)
