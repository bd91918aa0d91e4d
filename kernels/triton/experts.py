"""Routed and shared experts for any number of tokens: which kernels, in which order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.arithmetic import Arithmetic
from nybble.kernels.ops import MlpWeights, MoeWeights, Routing
from nybble.kernels.quantized_tensor import Format, QuantizedTensor
from nybble.kernels.triton import activation_order
from nybble.kernels.triton.activation import silu_mul, silu_mul_launch
from nybble.kernels.triton.activation_quantization import quantization_launch, quantize_activations
from nybble.kernels.triton.combine import combine_experts, combine_launch
from nybble.kernels.triton.expert_decode import (
    MAX_TOKENS,
    expert_down,
    expert_gate_up,
)
from nybble.kernels.triton.expert_grouped import (
    grouped_down,
    grouped_gate_up,
    most_block_m,
)
from nybble.kernels.triton.expert_schedule import (
    ExpertSchedule,
    expert_block_m,
    expert_schedule,
    expert_schedule_launch,
)
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.fp8_matrix import Fp8Matrix
from nybble.kernels.triton.launch_choice import LaunchChoice
from nybble.kernels.triton.matmul import NATIVE_TOKENS, Matrix, PlainMatrix, linear, operand_dtype
from nybble.kernels.triton.native_fp4 import (
    activation_format,
    native_down,
    native_fp4_launch,
    native_gate_up,
)


def mlp(x: Tensor, weights: MlpWeights[Matrix], dtype: torch.dtype, choice: LaunchChoice) -> Tensor:
    """`dtype` [T, H]: down(silu(gate(x)) * up(x)) of x [T, H'], in fragment order."""
    between = operand_dtype(weights.down, dtype)
    gate_up = linear(x, weights.gate_up, dtype, choice)
    launch = silu_mul_launch(choice.tokens(len(x)), weights.down.width, choice.arch)
    activated = silu_mul(
        gate_up, fragment_order=True, padded_width=weights.down.width, dtype=between, launch=launch
    )
    return linear(activated, weights.down, dtype, choice)


def moe_experts(
    x: Tensor, routing: Routing, weights: MoeWeights[Matrix], dtype: torch.dtype, choice: LaunchChoice
) -> Tensor:
    """`dtype` [T, H]: routed and shared experts of x [T, H'], the norm of the hidden states in fragment
    order."""
    gate_up, down, shared = weights.experts.gate_up, weights.experts.down, weights.shared_expert
    if not isinstance(gate_up, Fp4Matrix) or not isinstance(down, Fp4Matrix):
        routed = _plain_experts(x, routing, weights, choice.policy.arithmetic)
        return (routed + mlp(x, shared, torch.float32, choice)).to(dtype)
    num_experts = len(weights.router.bias)
    num_tokens = choice.tokens(len(x))
    held = gate_up, down, weights.first_expert
    batch = _Batch(x, routing, *held, num_experts, num_tokens, dtype, choice)
    if num_tokens > MAX_TOKENS:
        partials = batch.native() if batch.can_be_native else batch.grouped()
        launch = combine_launch(num_tokens, down.num_rows, choice.arch)
        extra = mlp(x, shared, dtype, choice)
        return combine_experts(partials, None, extra, dtype=dtype, launch=launch)
    if _is_alike(shared.gate_up, gate_up) and _is_alike(shared.down, down):
        return batch.decode(shared)
    return batch.decode(None) + mlp(x, shared, dtype, choice)


def _is_alike(matrix: Matrix, stack: Fp4Matrix) -> bool:
    """Whether the kernels of a stack of experts can take `matrix` as one more."""
    form = stack.block_size, stack.is_float16, stack.shape[1:]
    return isinstance(matrix, Fp4Matrix) and (matrix.block_size, matrix.is_float16, matrix.shape) == form


def _plain_experts(
    x: Tensor, routing: Routing, weights: MoeWeights[Matrix], arithmetic: Arithmetic
) -> Tensor:
    """float32 [T, H]: experts one by one, as the reference computes them; the host waits for the routing.

    x and the columns of the weights are in the same order, and so must be what is between the two products.
    """
    gate_up, down = weights.experts.gate_up, weights.experts.down
    if not isinstance(gate_up, PlainMatrix) or not isinstance(down, PlainMatrix):
        raise ValueError("gate, up and down of experts must have one format")
    total = torch.zeros(len(x), down.num_rows, dtype=torch.float32, device=x.device)
    for row in range(len(gate_up.weight)):
        tokens, ranks = (routing.ids == row + weights.first_expert).nonzero(as_tuple=True)
        if len(tokens):
            gate, up = arithmetic.linear(x[tokens], gate_up.weight[row]).chunk(2, dim=-1)
            product = arithmetic.elementwise(F.silu, gate) * up
            activated = F.pad(product, (0, down.width - gate.shape[-1]))
            output = arithmetic.linear(activation_order.to_fragment_order(activated), down.weight[row])
            total.index_add_(0, tokens, output.float() * routing.weights[tokens, ranks].unsqueeze(-1))
    return total


@dataclass(frozen=True)
class _Batch:
    """Tokens x [T, H'] with their routing, and the FP4 experts that are held of num_experts.

    num_tokens: for which to launch
    """

    x: Tensor
    routing: Routing
    gate_up: Fp4Matrix
    down: Fp4Matrix
    first_expert: int
    num_experts: int
    num_tokens: int
    dtype: torch.dtype
    choice: LaunchChoice

    @property
    def between(self) -> torch.dtype:
        return operand_dtype(self.down, self.dtype)

    @property
    def activation_format(self) -> Format | None:
        return activation_format(self.down.block_size, self.down.width, self.choice.arch)

    @property
    def can_be_native(self) -> bool:
        return self.num_tokens >= NATIVE_TOKENS and self.activation_format is not None

    def decode(self, shared: MlpWeights[Matrix] | None) -> Tensor:
        """`dtype` [T, H]; `shared` are FP4 matrices like those of one expert."""
        ids, (num_tokens, top_k) = self.routing.ids, self.routing.ids.shape
        shared_gate_up, shared_down = (shared.gate_up, shared.down) if shared else (None, None)
        assert not isinstance(shared_gate_up, Fp8Matrix | PlainMatrix)
        assert not isinstance(shared_down, Fp8Matrix | PlainMatrix)
        num_pairs = num_tokens * (top_k + (shared is not None))
        launch = self.choice.expert_gate_up(num_tokens, num_pairs, self.gate_up)
        held = self.gate_up, shared_gate_up, self.first_expert
        activated = expert_gate_up(self.x, ids, *held, self.between, launch=launch)
        launch = self.choice.expert_down(num_tokens, top_k, self.down)
        held = self.down, shared_down, self.first_expert
        return expert_down(activated, ids, self.routing.weights, *held, self.dtype, launch=launch)

    def grouped(self) -> Tensor:
        """float32 [T, top_k, H]: each pair's part of the sum."""
        schedule = self._schedule(min(self._wanted_block_m(), most_block_m(self.choice.arch)))
        launch = self.choice.grouped_gate_up(schedule.block_m, self.gate_up)
        top_k = self.routing.ids.shape[1]
        activated = grouped_gate_up(self.x, schedule, top_k, self.gate_up, self.between, launch=launch)
        launch = self.choice.grouped_down(schedule.block_m, self.down)
        return grouped_down(activated, schedule, self.routing.weights, self.down, launch=launch)

    def native(self) -> Tensor:
        """As `grouped`, with quantized activations."""
        format, block_size = self.activation_format, self.down.block_size
        assert format is not None
        launch = native_fp4_launch(self._wanted_block_m(), block_size, self.choice.arch)
        schedule, top_k = self._schedule(launch.block_tokens), self.routing.ids.shape[1]
        codes = self._quantized(self.x, format, is_fragment_order=True)
        activated = native_gate_up(codes, schedule, top_k, self.gate_up, self.dtype, launch=launch)
        codes = self._quantized(activated, format, is_fragment_order=False)
        return native_down(codes, schedule, self.routing.weights, self.down, launch=launch)

    def _quantized(self, x: Tensor, format: Format, is_fragment_order: bool) -> QuantizedTensor:
        launch = quantization_launch(x.shape[1], self.choice.arch)
        return quantize_activations(x, format, fragment_order=is_fragment_order, launch=launch)

    def _wanted_block_m(self) -> int:
        return expert_block_m(self.num_tokens, self.routing.ids.shape[1], self.num_experts)

    def _schedule(self, block_m: int) -> ExpertSchedule:
        ids, num_held = self.routing.ids, self.gate_up.shape[0]
        launch = expert_schedule_launch(ids.numel(), self.choice.arch)
        schedule = expert_schedule(ids, self.first_expert, num_held, block_m, launch=launch)
        return replace(schedule, is_partial=num_held < self.num_experts)
