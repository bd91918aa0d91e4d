"""Benchmark cases of one matrix: q/k/v and output projections, dense MLP, head."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.bench.cases import BenchCase, ModelShape
from nybble.kernels.bench.correctness import (
    QUANTIZED_TO_4_BITS,
    QUANTIZED_TO_8_BITS,
    ROUNDED_ONCE,
    Deviation,
    Tolerance,
    checked_rows,
    deviation,
)
from nybble.kernels.bench.inputs import BenchInputs, dequantized, natural
from nybble.kernels.bench.linear_peers import LinearProblem, linear_peers
from nybble.kernels.bench.workload import Workload, as_tensor
from nybble.kernels.quantized_tensor import NVFP4
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.launch_choice import LaunchChoice
from nybble.kernels.triton.matmul import NATIVE_TOKENS, Matrix, linear
from nybble.kernels.triton.native_fp4 import activation_format


def linear_workload(case: BenchCase, model: ModelShape, inputs: BenchInputs) -> Workload:
    num_rows, width = model.shard(case.tp).matrix(case.op)
    loaded = inputs.load(case.format, num_rows, width)
    x = inputs.activations(case.tokens, loaded.matrix)
    dtype = torch.float32 if case.op == "head" else inputs.dtype

    def run() -> Tensor:
        return linear(x, loaded.matrix, dtype, LaunchChoice(inputs.arch))

    def judge(output: Tensor) -> Deviation:
        rows = checked_rows(case.tokens).to(inputs.device)
        expected = natural(x[rows], width).float() @ dequantized(loaded.matrix, width).T
        return deviation(output, expected, rows)

    tolerance = _tolerance(case, loaded.matrix, inputs.arch)
    if loaded.source is None:
        return Workload(run, as_tensor, judge, tolerance)
    problem = LinearProblem(natural(x, width).to(inputs.dtype), loaded.source)
    return Workload(run, as_tensor, judge, tolerance, linear_peers(problem))


def _tolerance(case: BenchCase, matrix: Matrix, arch: int) -> Tolerance:
    format = None
    if isinstance(matrix, Fp4Matrix) and case.tokens >= NATIVE_TOKENS:
        format = activation_format(matrix.block_size, matrix.width, arch)
    if format is None:
        return ROUNDED_ONCE
    return QUANTIZED_TO_4_BITS if format is NVFP4 else QUANTIZED_TO_8_BITS
