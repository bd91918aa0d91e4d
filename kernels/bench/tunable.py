"""Launches of benchmark cases that can be tuned: each on its own, with any launch configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.kernels.bench.cases import LINEAR_OPS, BenchCase, ModelShape
from nybble.kernels.bench.inputs import BenchInputs
from nybble.kernels.bench.routing import expert_ids
from nybble.kernels.triton.expert_decode import MAX_TOKENS, expert_down, expert_gate_up
from nybble.kernels.triton.expert_grouped import grouped_down, grouped_gate_up, most_block_m
from nybble.kernels.triton.expert_schedule import expert_block_m, expert_schedule, expert_schedule_launch
from nybble.kernels.triton.fp4_linear import fp4_linear
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.fp8_linear import fp8_linear
from nybble.kernels.triton.fp8_matrix import Fp8Matrix
from nybble.kernels.triton.launch_choice import LaunchChoice
from nybble.kernels.triton.launch_table import bucket
from nybble.kernels.triton.matmul import NATIVE_TOKENS


@dataclass(frozen=True)
class Tunable:
    """run: the launch with one configuration, returning what it computed. shape: as in a launch table."""

    op: str
    format: str
    shape: dict[str, int]
    default: Any
    run: Callable[[Any], Tensor]


def tunables(case: BenchCase, model: ModelShape, inputs: BenchInputs) -> Iterator[Tunable]:
    """None of cases whose kernels have nothing to choose."""
    if case.op in LINEAR_OPS:
        yield from _linear(case, model, inputs)
    elif case.op == "experts" and case.tokens <= MAX_TOKENS:
        yield from _decoding_experts(case, model.shard(case.tp), inputs)
    elif case.op == "experts" and (inputs.arch < 100 or case.tokens < NATIVE_TOKENS):
        yield from _grouped_experts(case, model.shard(case.tp), inputs)


def _linear(case: BenchCase, model: ModelShape, inputs: BenchInputs) -> Iterator[Tunable]:
    matrix = inputs.load(case.format, *model.shard(case.tp).matrix(case.op)).matrix
    x = inputs.activations(case.tokens, matrix)
    shape = _shape(case.tokens, matrix.num_rows, matrix.width)
    choice = LaunchChoice(inputs.arch)
    dtype = torch.float32 if case.op == "head" else inputs.dtype
    if isinstance(matrix, Fp8Matrix):
        fp8_default = choice.fp8_linear(case.tokens, matrix)
        yield Tunable(
            "fp8_linear",
            case.format,
            shape,
            fp8_default,
            lambda launch: fp8_linear(x, matrix, dtype, launch=launch),
        )
    elif isinstance(matrix, Fp4Matrix) and (inputs.arch < 100 or case.tokens < NATIVE_TOKENS):
        default = choice.fp4_linear(case.tokens, matrix)
        yield Tunable(
            "fp4_linear",
            case.format,
            shape,
            default,
            lambda launch: fp4_linear(x, matrix, dtype, launch=launch),
        )


def _decoding_experts(case: BenchCase, shard: ModelShape, inputs: BenchInputs) -> Iterator[Tunable]:
    gate_up, down = _stacks(case, shard, inputs)
    ids, weights = _choice(case, shard, inputs)
    x = inputs.activations(case.tokens, gate_up)
    between = inputs.operand_dtype
    pairs = ids.numel()
    choice = LaunchChoice(inputs.arch)
    first = choice.expert_gate_up(case.tokens, pairs, gate_up)
    second = choice.expert_down(case.tokens, shard.top_k, down)
    activated = inputs.normal(case.tokens, shard.top_k, down.width, dtype=between)
    yield Tunable(
        "expert_gate_up",
        case.format,
        _shape(case.tokens, gate_up.num_rows, gate_up.width),
        first,
        lambda launch: expert_gate_up(x, ids, gate_up, None, 0, between, launch=launch),
    )
    yield Tunable(
        "expert_down",
        case.format,
        _shape(case.tokens, down.num_rows, down.width),
        second,
        lambda launch: expert_down(activated, ids, weights, down, None, 0, inputs.dtype, launch=launch),
    )


def _grouped_experts(case: BenchCase, shard: ModelShape, inputs: BenchInputs) -> Iterator[Tunable]:
    gate_up, down = _stacks(case, shard, inputs)
    ids, weights = _choice(case, shard, inputs)
    x = inputs.activations(case.tokens, gate_up)
    between = inputs.operand_dtype
    block_m = min(expert_block_m(case.tokens, shard.top_k, shard.num_experts), most_block_m(inputs.arch))
    launch = expert_schedule_launch(ids.numel(), inputs.arch)
    schedule = expert_schedule(ids, 0, shard.num_experts, block_m, launch=launch)
    activated = inputs.normal(ids.numel(), down.width, dtype=between)
    yield Tunable(
        "grouped_gate_up",
        case.format,
        {"block_m": block_m, "rows": gate_up.num_rows, "width": gate_up.width},
        LaunchChoice(inputs.arch).grouped_gate_up(block_m, gate_up),
        lambda launch: grouped_gate_up(x, schedule, shard.top_k, gate_up, between, launch=launch),
    )
    yield Tunable(
        "grouped_down",
        case.format,
        {"block_m": block_m, "rows": down.num_rows, "width": down.width},
        LaunchChoice(inputs.arch).grouped_down(block_m, down),
        lambda launch: grouped_down(activated, schedule, weights, down, launch=launch),
    )


def _stacks(case: BenchCase, shard: ModelShape, inputs: BenchInputs) -> tuple[Fp4Matrix, Fp4Matrix]:
    gate_up = inputs.load(case.format, shard.num_experts, 2 * shard.expert_width, shard.hidden).matrix
    down = inputs.load(case.format, shard.num_experts, shard.hidden, shard.expert_width).matrix
    assert isinstance(gate_up, Fp4Matrix) and isinstance(down, Fp4Matrix)
    return gate_up, down


def _choice(case: BenchCase, shard: ModelShape, inputs: BenchInputs) -> tuple[Tensor, Tensor]:
    ids = expert_ids(case.tokens, shard.num_experts, shard.top_k, case.routing or "uniform").to(inputs.device)
    return ids, inputs.normal(case.tokens, shard.top_k, dtype=torch.float32).sigmoid()


def _shape(num_tokens: int, num_rows: int, width: int) -> dict[str, int]:
    return {"tokens": bucket(num_tokens), "rows": num_rows, "width": width}
