"""Experts by other libraries: routed ones and the shared one, as our kernels compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.bench.linear_peers import MARLIN, marlin_linear, marlin_scales
from nybble.kernels.bench.peers import library, require, require_room
from nybble.kernels.bench.workload import Peer, PeerMissingError
from nybble.kernels.ops import Routing
from nybble.kernels.quantized_tensor import NVFP4, QuantizedTensor

# Where the function has been: now, and until vLLM 0.20.
_MARLIN_MOE = (
    "vllm.model_executor.layers.fused_moe.experts.marlin_moe",
    "vllm.model_executor.layers.fused_moe.fused_marlin_moe",
)


@dataclass(frozen=True)
class ExpertProblem:
    """x [T, H] in natural order; gate_up [E, 2I, H], down [E, H, I]; shared: the same of one expert."""

    x: Tensor
    routing: Routing
    gate_up: QuantizedTensor
    down: QuantizedTensor
    shared_gate_up: QuantizedTensor
    shared_down: QuantizedTensor


def expert_peers(problem: ExpertProblem) -> tuple[Peer, ...]:
    return (
        Peer("torch grouped_mm bf16", lambda: _grouped_mm(problem)),
        Peer("vllm marlin", lambda: _marlin(problem)),
    )


def _grouped_mm(problem: ExpertProblem) -> Callable[[], Tensor]:
    """Weights dequantized to bfloat16. Sorting tokens by expert is timed, as it is for our kernels."""
    require(hasattr(F, "grouped_mm"), "this torch has no grouped_mm")
    num_weights = 2 * (problem.gate_up.codes.numel() + problem.down.codes.numel())
    require_room(2 * num_weights, "a copy of the experts in bfloat16", problem.x.device)
    x, routing = problem.x, problem.routing
    gate_up = problem.gate_up.dequantize(x.dtype).transpose(1, 2)
    down = problem.down.dequantize(x.dtype).transpose(1, 2)
    shared_gate_up = problem.shared_gate_up.dequantize(x.dtype)
    shared_down = problem.shared_down.dequantize(x.dtype)
    num_experts, top_k = gate_up.shape[0], routing.ids.shape[1]

    def run() -> Tensor:
        ordered, order = routing.ids.flatten().sort(stable=True)
        experts = torch.arange(num_experts, dtype=ordered.dtype, device=x.device)
        ends = torch.searchsorted(ordered, experts, right=True).int()
        gate, up = F.grouped_mm(x[order // top_k], gate_up, offs=ends).chunk(2, dim=-1)
        pairs = F.grouped_mm(F.silu(gate) * up, down, offs=ends) * routing.weights.flatten()[order, None]
        routed = torch.zeros(x.shape, device=x.device).index_add_(0, order // top_k, pairs.float())
        gate, up = F.linear(x, shared_gate_up).chunk(2, dim=-1)
        return (routed + F.linear(F.silu(gate) * up, shared_down)).to(x.dtype)

    return run


def _marlin(problem: ExpertProblem) -> Callable[[], Tensor]:
    """As vLLM's own layers call it, in the versions of 2026; the shared expert is two dense Marlin
    products."""
    fused_marlin_moe = _marlin_moe()
    config = library("vllm.config")
    quant_type = library("vllm.scalar_type").scalar_types.float4_e2m1f
    with config.set_current_vllm_config(config.VllmConfig()):
        arguments = _marlin_weights(problem)
    x, routing = problem.x.contiguous(), problem.routing
    shared_gate_up = marlin_linear(x, problem.shared_gate_up)
    activated = torch.empty(len(x), problem.shared_down.shape[1], dtype=x.dtype, device=x.device)
    shared_down = marlin_linear(activated, problem.shared_down)

    def run() -> Tensor:
        routed = fused_marlin_moe(
            hidden_states=x,
            topk_weights=routing.weights,
            topk_ids=routing.ids,
            quant_type_id=quant_type.id,
            bias1=None,
            bias2=None,
            **arguments,
        )
        gate, up = shared_gate_up().chunk(2, dim=-1)
        torch.mul(F.silu(gate), up, out=activated)
        return routed + shared_down()

    return run


def _marlin_moe() -> Callable[..., Tensor]:
    missing = PeerMissingError("vllm has no fused_marlin_moe where it was looked for")
    for name in _MARLIN_MOE:
        try:
            function: Callable[..., Tensor] = library(name).fused_marlin_moe
        except (PeerMissingError, AttributeError) as error:
            missing = PeerMissingError(str(error))
            continue
        return function
    raise missing


def _marlin_weights(problem: ExpertProblem) -> dict[str, Tensor | None]:
    marlin = library(MARLIN)
    gate_up, down = problem.gate_up, problem.down
    num_experts, hidden, width = down.shape
    layer = SimpleNamespace(
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size_per_partition=width,
        params_dtype=problem.x.dtype,
    )
    scales = marlin_scales(gate_up), marlin_scales(down)
    if gate_up.format is NVFP4:
        first = (gate_up.codes, scales[0], gate_up.row_factors()[:, 0].contiguous())
        second = (down.codes, scales[1], down.row_factors()[:, 0].contiguous())
        prepared = marlin.prepare_nvfp4_moe_layer_for_marlin(layer, *first, *second, True)
        names = ("w1", "w1_scale", "global_scale1", "w2", "w2_scale", "global_scale2")
        return dict(zip(names, prepared, strict=True))
    prepared = marlin.prepare_moe_mxfp4_layer_for_marlin(
        layer, gate_up.codes, down.codes, *scales, None, None
    )
    return dict(zip(("w1", "w2", "w1_scale", "w2_scale"), prepared[:4], strict=True))
