"""Tiny kernels, and what is asked of them in a process that compiles (see aot_process)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from nybble.kernels.compiled.aot import compile_launch, launch_resources
from nybble.kernels.compiled.packed_operands import scattered_operands
from nybble.kernels.triton.launch import KernelLaunch, launch, recorded_launches

BLOCK_TOKENS, BLOCK_ROWS, BLOCK_COLUMNS = 16, 128, 64


@triton.jit(do_not_specialize=["plain"])
def _kinds_kernel(aligned, shifted, absent, one, many, odd, long, half, switch, plain, LENGTH: tl.constexpr):
    at = tl.arange(0, LENGTH)
    value = tl.load(aligned + at * many) + tl.load(shifted + at * odd) * half
    if absent is not None:
        value += tl.load(absent + at)
    tl.store(aligned + at * one + long, tl.where(switch, value, value + plain))


@triton.jit
def _sum_kernel(values, sums, length, BLOCK: tl.constexpr):
    """Each thread's values are needed twice, once before and once after a sum over all."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        block = tl.load(values + start + at, mask=start + at < length, other=0.0)
        total += block / tl.sum(block)
    tl.store(sums + at, total)


@triton.jit
def _matmul_kernel(
    tokens,
    rows,
    outputs,
    num_columns,
    IS_PACKED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """outputs [rows, tokens]. Packed rows hold two columns a byte, which threads must fetch one by one."""
    row, token = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_TOKENS)
    column, byte = tl.arange(0, BLOCK_COLUMNS), tl.arange(0, BLOCK_COLUMNS // 2)
    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        if IS_PACKED:
            packed = tl.load(rows + row[:, None] * (num_columns // 2) + (start // 2 + byte)[None, :])
            weights = tl.interleave((packed & 15).to(tl.bfloat16), (packed >> 4).to(tl.bfloat16))
        else:
            weights = tl.load(rows + row[:, None] * num_columns + (start + column)[None, :])
        inputs = tl.load(tokens + token[None, :] * num_columns + (start + column)[:, None])
        total = tl.dot(weights, inputs, total)
    tl.store(outputs + row[:, None] * BLOCK_TOKENS + token[None, :], total)


@triton.jit
def _paired_kernel(codes, words, ALONG_ROWS: tl.constexpr):
    """Both halves of a word changed at once: neighbours, if memory runs along the rows."""
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    at = row * 64 + column if ALONG_ROWS else column * 64 + row
    loaded = tl.load(codes + at)
    changed = tl.inline_asm_elementwise(
        "not.b32 $0, $1;", "=r,r", [loaded], dtype=tl.uint16, is_pure=True, pack=2
    )
    tl.store(words + at, changed)


def kinds() -> None:
    numbers = torch.empty(64, device="meta")
    launch(_kinds_kernel, (1,), numbers, numbers[1:], None, 1, 32, 7, 2**40, 0.5, True, 16, LENGTH=32)


def spilled() -> None:
    numbers = torch.empty(4096, device="meta")
    launch(_sum_kernel, (1,), numbers, numbers, 4096, BLOCK=1024, num_warps=1, maxnreg=32)


def summed() -> None:
    numbers = torch.empty(4096, device="meta")
    launch(_sum_kernel, (1,), numbers, numbers, 4096, BLOCK=1024, num_warps=4)


def dense_matmul() -> None:
    _matmul(_meta(BLOCK_ROWS, 4096), is_packed=False)


def packed_matmul() -> None:
    _matmul(_meta(BLOCK_ROWS, 2048, dtype=torch.uint8), is_packed=True)


def kinds_found(arch: int) -> dict[str, Any]:
    """How the launch of `kinds` was understood, and whether a launch by Triton gives the same kernel."""
    recorded = _recorded(kinds)
    source = compile_launch(recorded, arch).src
    return {
        "signature": source.signature,
        "constants": {str(at): value for (at,), value in source.constants.items()},
        "divisible": sorted(at for (at,), attributes in source.attrs.items() if attributes),
        "hash": compile_launch(recorded, arch).hash,
        "hash_of_a_launch": _launched_hash(recorded, arch),
    }


def measured(name: str, arch: int) -> dict[str, Any]:
    resources = launch_resources(_recorded(globals()[name]), arch)
    hot_loop = resources.hot_loop
    assert hot_loop is not None
    return asdict(resources) | {
        "matrix": hot_loop.matrix,
        "narrow_shared_loads": hot_loop.narrow_shared_loads,
        "global_bytes_per_thread": hot_loop.global_bytes_per_thread,
        "spills": resources.kernel.spills,
        "threads": resources.threads,
    }


def all_measured(questions: list[tuple[str, int]]) -> list[dict[str, Any]]:
    return [measured(name, arch) for name, arch in questions]


def paired_faults(is_along_rows: bool) -> list[str]:
    codes = _meta(64, 64, dtype=torch.uint16)
    recorded = _recorded(
        lambda: launch(_paired_kernel, (1,), codes, codes, ALONG_ROWS=is_along_rows, num_warps=4)
    )
    return scattered_operands(compile_launch(recorded, 90).asm["ttgir"])


def _matmul(rows: Tensor, is_packed: bool) -> None:
    launch(
        _matmul_kernel,
        (1,),
        _meta(BLOCK_TOKENS, 4096),
        rows,
        _meta(BLOCK_ROWS, BLOCK_TOKENS, dtype=torch.float32),
        4096,
        IS_PACKED=is_packed,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=4,
        num_stages=3,
    )


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _recorded(start: Callable[[], None]) -> KernelLaunch:
    with recorded_launches() as launches:
        start()
    (recorded,) = launches
    return recorded


def _launched_hash(recorded: KernelLaunch, arch: int) -> str:
    with _driver_of(arch):
        options = recorded.options | {"enable_fp_fusion": True}
        started = recorded.kernel.warmup(*recorded.arguments, grid=recorded.grid, **options)
    return str(started.hash)


class _AbsentGpu:
    """As much of a driver as JITFunction.run asks before it would start a kernel."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _driver_of(arch: int) -> Iterator[None]:
    triton.runtime.driver.set_active(_AbsentGpu(arch))
    try:
        yield
    finally:
        triton.runtime.driver.set_active(None)
