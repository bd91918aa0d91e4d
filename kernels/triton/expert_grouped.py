"""The experts of many tokens: tiles of tokens that share an expert, as `expert_schedule` lays them
out.

Grids are as large as the worst routing needs and programs beyond the device's count of tiles end at once, so
the host waits for nothing. Programs of one tile of tokens stand side by side: its activations stay in the
L2 cache while the expert's weights are read once for each tile.

`grouped_gate_up` stores silu(gate) * up for each pair of token and expert, in the order of pairs;
`grouped_down` multiplies by the route weight. Adding up a token's experts is left to `combine`: in a
fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.triton import activation_order
from nybble.kernels.triton.expert_schedule import ExpertSchedule
from nybble.kernels.triton.fp4 import is_roomy, narrow, num_splits, product, scale_offset
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.launch import launch as start
from nybble.kernels.triton.stored_order import stored_at


@dataclass(frozen=True)
class ExpertGroupedLaunch:
    """block_rows: rows of the expert's matrix a program; of gate_up half are gate's and half up's.

    splits: warps that share the columns, 1 if none do; is_joined: see `fp4`, for instructions of four warps.
    """

    block_rows: int
    splits: int
    is_joined: bool
    num_warps: int
    num_stages: int


def most_block_m(arch: int) -> int:
    """Tokens of a tile beyond which registers are spilled or weights unpacked again for each tile of them."""
    return 64 if arch == 90 else 16 if arch == 100 else 32


def expert_grouped_launch(block_m: int, num_rows: int, width: int, arch: int) -> ExpertGroupedLaunch:
    """For tiles of block_m tokens by experts of num_rows rows and `width` columns, on compute capability
    arch / 10."""
    if block_m <= 16 or arch == 100:  # sm_100 has its own matrix instructions for more
        splits = num_splits(width, 4)
        block_rows = 64 if splits == 2 or is_roomy(arch) else 32
        return ExpertGroupedLaunch(block_rows, splits, False, splits, 3)
    if num_rows < 1024:
        return ExpertGroupedLaunch(64, 1, arch == 90, 4, 3)
    if arch == 120:  # which has less shared memory
        return ExpertGroupedLaunch(128, 1, False, 4, 3)
    return ExpertGroupedLaunch(256, 1, arch == 90, 8, 3)


def grouped_gate_up(
    x: Tensor,
    schedule: ExpertSchedule,
    top_k: int,
    gate_up: Fp4Matrix,
    out_dtype: torch.dtype,
    *,
    launch: ExpertGroupedLaunch,
) -> Tensor:
    """out_dtype [T * top_k, I']: silu(gate) * up of each pair, in fragment order.

    x [T, K'], in fragment order; gate_up: stack [E, 2I, K]; I' is I padded with zeros to a multiple of 64.
    Pairs of experts that are not in the stack are not written.
    """
    num_pairs = x.shape[0] * top_k
    intermediate = gate_up.num_rows // 2
    padded = activation_order.padded_width(intermediate)
    y = torch.empty(num_pairs, padded, dtype=out_dtype, device=x.device)
    start(
        _grouped_gate_up_kernel,
        (triton.cdiv(2 * padded, launch.block_rows), len(schedule.tile_experts)),
        *(x, y, *_schedule_arguments(schedule), *_weight_arguments(gate_up)),
        *(num_pairs, intermediate, padded, x.stride(0)),
        TOP_K=top_k,
        **_constants(gate_up, schedule, launch),
    )
    return y


def grouped_down(
    x: Tensor, schedule: ExpertSchedule, weights: Tensor, down: Fp4Matrix, *, launch: ExpertGroupedLaunch
) -> Tensor:
    """float32 [T, top_k, N]: each pair's product, times its route weight.

    x [T * top_k, I'], in fragment order; weights float32 [T, top_k]; down: stack [E, N, I]. Zero for pairs of
    experts that are not in the stack.
    """
    num_pairs = weights.numel()
    # Pairs without an expert here are in no tile: where there are such, someone has to write zeros.
    make = torch.zeros if schedule.is_partial else torch.empty
    y = make(*weights.shape, down.num_rows, dtype=torch.float32, device=x.device)
    start(
        _grouped_down_kernel,
        (triton.cdiv(down.num_rows, launch.block_rows), len(schedule.tile_experts)),
        *(x, y, weights, *_schedule_arguments(schedule), *_weight_arguments(down)),
        *(num_pairs, down.num_rows, x.stride(0)),
        **_constants(down, schedule, launch),
    )
    return y


def _schedule_arguments(schedule: ExpertSchedule) -> tuple[Tensor, ...]:
    return schedule.sorted_slots, schedule.tile_experts, schedule.num_tiles


def _weight_arguments(weight: Fp4Matrix) -> tuple[object, ...]:
    return (
        weight.codes.view(torch.uint16),
        weight.scale_words,
        weight.row_scales,
        weight.codes.stride(0) // 2,
        weight.scale_words.stride(0),
        weight.width // 4,
        weight.scale_words.stride(-3),
        weight.width,
    )


def _constants(weight: Fp4Matrix, schedule: ExpertSchedule, launch: ExpertGroupedLaunch) -> dict[str, object]:
    return {
        "SPLITS": launch.splits,
        "ROWS": launch.block_rows,
        "TOKENS": schedule.block_m,
        "BLOCK_SIZE": weight.block_size,
        "FLOAT16": weight.is_float16,
        "JOINED": launch.is_joined,
        "EVEN": weight.width % (256 * launch.splits) == 0,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


@triton.jit
def _grouped_gate_up_kernel(
    x_ptr, y_ptr, slot_ptr, expert_ptr, count_ptr, code_ptr, scale_ptr, row_scale_ptr,
    expert_code_stride, expert_scale_stride, code_stride, scale_stride, width,
    num_pairs, intermediate, padded, x_stride,
    TOP_K: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, JOINED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(count_ptr):
        return
    expert = tl.load(expert_ptr + tile)
    pair = tl.load(slot_ptr + tile * TOKENS + tl.arange(0, TOKENS))
    HALF: tl.constexpr = ROWS // 2
    part = tl.arange(0, ROWS) // HALF
    row = tl.minimum(block * HALF + tl.arange(0, ROWS) % HALF, intermediate - 1) + part * intermediate
    sums = product(
        x_ptr, (pair // TOP_K * x_stride)[None, :], (pair < num_pairs)[None, :],
        code_ptr + expert.to(tl.int64) * expert_code_stride, row[:, None] * code_stride,
        scale_ptr + expert.to(tl.int64) * expert_scale_stride,
        scale_offset(row, scale_stride, BLOCK_SIZE)[:, None],
        width, SPLITS, ROWS, TOKENS, BLOCK_SIZE, FLOAT16, JOINED, EVEN,
    )  # fmt: skip
    products = sums * tl.load(row_scale_ptr + expert * 2 * intermediate + row)[:, None]
    gate, up = tl.split(products.reshape(2, HALF, TOKENS).permute(1, 2, 0))
    neuron = block * HALF + tl.arange(0, HALF)
    activated = tl.where((neuron < intermediate)[:, None], gate * tl.sigmoid(gate) * up, 0.0)
    y_at = y_ptr + pair.to(tl.int64)[None, :] * padded + stored_at(neuron, True)[:, None]
    is_inside = (neuron < padded)[:, None] & (pair < num_pairs)[None, :]
    tl.store(y_at, narrow(activated, y_ptr), mask=is_inside)


@triton.jit
def _grouped_down_kernel(
    x_ptr, y_ptr, weight_ptr, slot_ptr, expert_ptr, count_ptr, code_ptr, scale_ptr, row_scale_ptr,
    expert_code_stride, expert_scale_stride, code_stride, scale_stride, width,
    num_pairs, num_rows, x_stride,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, JOINED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(count_ptr):
        return
    expert = tl.load(expert_ptr + tile)
    pair = tl.load(slot_ptr + tile * TOKENS + tl.arange(0, TOKENS))
    row = block * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(row, num_rows - 1)
    sums = product(
        x_ptr, (pair.to(tl.int64) * x_stride)[None, :], (pair < num_pairs)[None, :],
        code_ptr + expert.to(tl.int64) * expert_code_stride, read[:, None] * code_stride,
        scale_ptr + expert.to(tl.int64) * expert_scale_stride,
        scale_offset(read, scale_stride, BLOCK_SIZE)[:, None],
        width, SPLITS, ROWS, TOKENS, BLOCK_SIZE, FLOAT16, JOINED, EVEN,
    )  # fmt: skip
    weight = tl.load(weight_ptr + pair, mask=pair < num_pairs, other=0.0)
    row_scale = tl.load(row_scale_ptr + expert * num_rows + read)
    y_at = y_ptr + pair.to(tl.int64)[None, :] * num_rows + row[:, None]
    is_inside = (row < num_rows)[:, None] & (pair < num_pairs)[None, :]
    tl.store(y_at, sums * row_scale[:, None] * weight[None, :], mask=is_inside)
