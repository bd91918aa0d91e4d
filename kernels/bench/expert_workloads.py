"""Benchmark cases of experts: all between the router's choice and the sum of a token's experts. The shared
expert is one of them, for our kernels and for peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from nybble.kernels import reference_ops
from nybble.kernels.bench.cases import BenchCase, ModelShape
from nybble.kernels.bench.correctness import (
    QUANTIZED_TO_4_BITS,
    QUANTIZED_TO_8_BITS,
    ROUNDED_TWICE,
    Deviation,
    Tolerance,
    checked_rows,
    deviation,
)
from nybble.kernels.bench.expert_peers import ExpertProblem, expert_peers
from nybble.kernels.bench.inputs import BenchInputs, LoadedWeight, natural
from nybble.kernels.bench.routing import expert_ids
from nybble.kernels.bench.workload import Workload, as_tensor
from nybble.kernels.ops import MlpWeights, MoeWeights, RmsNorm, RouterWeights, Routing
from nybble.kernels.quantized_tensor import NVFP4, QuantizedTensor
from nybble.kernels.triton.experts import moe_experts
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.launch_choice import LaunchChoice
from nybble.kernels.triton.matmul import NATIVE_TOKENS, Matrix
from nybble.kernels.triton.native_fp4 import activation_format

_ROUTED_SCALE = 2.5


@dataclass(frozen=True)
class _Experts:
    gate_up: LoadedWeight
    down: LoadedWeight
    shared_gate_up: LoadedWeight
    shared_down: LoadedWeight

    def weights(self, shard: ModelShape, inputs: BenchInputs) -> MoeWeights[Matrix]:
        norm = RmsNorm(inputs.normal(shard.hidden), 1e-5)
        bias = inputs.normal(shard.num_experts, dtype=torch.float32)
        weight = inputs.normal(shard.num_experts, shard.hidden, dtype=torch.float32)
        router = RouterWeights(weight, bias, shard.top_k, 1, 1, normalize=True, scale=_ROUTED_SCALE)
        experts = MlpWeights(self.gate_up.matrix, self.down.matrix)
        return MoeWeights(
            norm, router, experts, MlpWeights(self.shared_gate_up.matrix, self.shared_down.matrix)
        )

    def sources(self) -> tuple[QuantizedTensor, ...]:
        """Empty where there are no numbers."""
        parts = (self.gate_up, self.down, self.shared_gate_up, self.shared_down)
        return tuple(part.source for part in parts if isinstance(part.source, QuantizedTensor))

    def expected(self, x: Tensor, routing: Routing) -> Tensor:
        """float32 [T, H] of x float32 [T, H] in natural order."""
        stacks = MlpWeights(_Dequantized(self.gate_up.matrix), _Dequantized(self.down.matrix))
        routed = reference_ops.experts(x, routing, cast("MlpWeights[Tensor]", stacks))
        shared = MlpWeights(_dequantize(self.shared_gate_up.matrix), _dequantize(self.shared_down.matrix))
        return routed + reference_ops.mlp(x, shared)


class _Dequantized:
    """A stack of matrices of which one at a time is dequantized: all would not fit."""

    def __init__(self, stack: Matrix) -> None:
        assert isinstance(stack, Fp4Matrix)
        self._stack = stack

    def __len__(self) -> int:
        return self._stack.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self._stack[index].dequantize()


def expert_workload(case: BenchCase, model: ModelShape, inputs: BenchInputs) -> Workload:
    shard = model.shard(case.tp)
    experts = _load(case.format, shard, inputs)
    weights, routing = experts.weights(shard, inputs), _routing(case, shard, inputs)
    x = inputs.activations(case.tokens, experts.gate_up.matrix)

    def run() -> Tensor:
        return moe_experts(x, routing, weights, inputs.dtype, LaunchChoice(inputs.arch))

    def judge(output: Tensor) -> Deviation:
        rows = checked_rows(case.tokens).to(inputs.device)
        expected = experts.expected(
            natural(x[rows], shard.hidden).float(), Routing(routing.ids[rows], routing.weights[rows])
        )
        return deviation(output, expected, rows)

    tolerance = _tolerance(case, experts.down.matrix, inputs.arch)
    problem = None
    if sources := experts.sources():
        problem = ExpertProblem(natural(x, shard.hidden).to(inputs.dtype), routing, *sources)
    return Workload(run, as_tensor, judge, tolerance, expert_peers(problem) if problem else ())


def _load(format: str, shard: ModelShape, inputs: BenchInputs) -> _Experts:
    gate_up, down = (2 * shard.expert_width, shard.hidden), (shard.hidden, shard.expert_width)
    return _Experts(
        inputs.load(format, shard.num_experts, *gate_up),
        inputs.load(format, shard.num_experts, *down),
        inputs.load(format, *gate_up),
        inputs.load(format, *down),
    )


def _routing(case: BenchCase, shard: ModelShape, inputs: BenchInputs) -> Routing:
    assert case.routing is not None
    shape = case.tokens, shard.top_k
    if inputs.is_meta:
        return Routing(inputs.empty(*shape, dtype=torch.int32), inputs.empty(*shape, dtype=torch.float32))
    ids = expert_ids(case.tokens, shard.num_experts, shard.top_k, case.routing).to(inputs.device)
    scores = inputs.normal(*shape, dtype=torch.float32).sigmoid()
    return Routing(ids, _ROUTED_SCALE * scores / scores.sum(dim=1, keepdim=True))


def _tolerance(case: BenchCase, down: Matrix, arch: int) -> Tolerance:
    assert isinstance(down, Fp4Matrix)
    format = activation_format(down.block_size, down.width, arch)
    if format is None or case.tokens < NATIVE_TOKENS:
        return ROUNDED_TWICE
    return QUANTIZED_TO_4_BITS if format is NVFP4 else QUANTIZED_TO_8_BITS


def _dequantize(matrix: Matrix) -> Tensor:
    assert isinstance(matrix, Fp4Matrix)
    return matrix.dequantize()
