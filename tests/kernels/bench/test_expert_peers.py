"""Peers of experts: torch's grouped product, and vLLM's Marlin by a stand-in with its interface."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.kernels import mxfp4, nvfp4, reference_ops
from nybble.kernels.bench.expert_peers import ExpertProblem, expert_peers
from nybble.kernels.bench.linear_peers import MARLIN
from nybble.kernels.bench.workload import PeerMissingError
from nybble.kernels.ops import MlpWeights, Routing
from nybble.kernels.quantized_tensor import MXFP4, NVFP4, QuantizedTensor, stack

EXPERTS, HIDDEN, WIDTH, TOP_K = 5, 64, 32, 2
MOE = "vllm.model_executor.layers.fused_moe.experts.marlin_moe"


def make_problem(quantize: Any) -> ExpertProblem:
    generator = torch.Generator().manual_seed(5)

    def matrix(*shape: int) -> QuantizedTensor:
        weight: QuantizedTensor = quantize(torch.randn(*shape, generator=generator) / shape[1] ** 0.5)
        return weight

    ids = torch.rand(6, EXPERTS, generator=generator).topk(TOP_K).indices.int()
    return ExpertProblem(
        x=torch.randn(6, HIDDEN, generator=generator).bfloat16(),
        routing=Routing(ids, torch.rand(6, TOP_K, generator=generator)),
        gate_up=stack([matrix(2 * WIDTH, HIDDEN) for _ in range(EXPERTS)]),
        down=stack([matrix(HIDDEN, WIDTH) for _ in range(EXPERTS)]),
        shared_gate_up=matrix(2 * WIDTH, HIDDEN),
        shared_down=matrix(HIDDEN, WIDTH),
    )


def routed(x: Tensor, routing: Routing, gate_up: QuantizedTensor, down: QuantizedTensor) -> Tensor:
    weights = MlpWeights(gate_up.dequantize(), down.dequantize())
    return reference_ops.experts(x.float(), routing, weights)


def expected(problem: ExpertProblem) -> Tensor:
    shared = MlpWeights(problem.shared_gate_up.dequantize(), problem.shared_down.dequantize())
    found = routed(problem.x, problem.routing, problem.gate_up, problem.down)
    return found + reference_ops.mlp(problem.x.float(), shared)


QUANTIZERS = pytest.mark.parametrize("quantize", [nvfp4.quantize, mxfp4.quantize], ids=["nvfp4", "mxfp4"])


@QUANTIZERS
def test_grouped_mm(quantize: Any) -> None:
    problem = make_problem(quantize)
    peer, _ = expert_peers(problem)
    torch.testing.assert_close(peer.prepare()().float(), expected(problem), atol=0.05, rtol=0.05)


def quantized(codes: Tensor, scales: Tensor, global_scale: Tensor | None) -> QuantizedTensor:
    """As the weights were before the stand-in's `prepare`, which leaves them alone."""
    if global_scale is None:
        return QuantizedTensor(codes, scales.view(torch.float8_e8m0fnu), None, MXFP4)
    return QuantizedTensor(codes, scales, global_scale.expand(codes.shape[:-1]).contiguous(), NVFP4)


def fused_marlin_moe(
    *, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, quant_type_id: int, bias1: None, bias2:
    None, w1: Tensor, w2: Tensor, w1_scale: Tensor, w2_scale: Tensor, global_scale1: Tensor | None = None,
    global_scale2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert quant_type_id == 7
    scales = [None if scale is None else scale.view(-1, 1) for scale in (global_scale1, global_scale2)]
    weights = quantized(w1, w1_scale, scales[0]), quantized(w2, w2_scale, scales[1])
    return routed(hidden_states, Routing(topk_ids, topk_weights), *weights).to(hidden_states.dtype)


def apply_linear(x: Tensor, weight: Any, scale: Any, global_scale: Any, *rest: Any) -> Tensor:
    return (x.float() @ quantized(weight, scale, global_scale).dequantize().T).to(x.dtype)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(name: str, **contents: Any) -> None:
        names = name.split(".")
        for end in range(1, len(names) + 1):
            part = ".".join(names[:end])
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
        vars(sys.modules[name]).update(contents)

    def prepare_nvfp4(
        layer: Any, w1: Any, s1: Any, g1: Any, w2: Any, s2: Any, g2: Any, is_gated: bool
    ) -> Any:
        assert (layer.num_experts, layer.hidden_size, is_gated) == (EXPERTS, HIDDEN, True)
        return w1, s1, g1, w2, s2, g2

    def prepare_mxfp4(layer: Any, w1: Any, w2: Any, s1: Any, s2: Any, b1: None, b2: None) -> Any:
        return w1, w2, s1, s2, b1, b2

    add(
        MARLIN,
        prepare_nvfp4_moe_layer_for_marlin=prepare_nvfp4,
        prepare_moe_mxfp4_layer_for_marlin=prepare_mxfp4,
        prepare_fp4_layer_for_marlin=lambda layer: setattr(layer, "workspace", None),
        apply_fp4_marlin_linear=apply_linear,
    )
    add(MOE, fused_marlin_moe=fused_marlin_moe)
    add("vllm.config", VllmConfig=object, set_current_vllm_config=nullcontext)
    add("vllm.scalar_type", scalar_types=SimpleNamespace(float4_e2m1f=SimpleNamespace(id=7)))


@QUANTIZERS
def test_marlin(quantize: Any, vllm: None) -> None:
    problem = make_problem(quantize)
    _, peer = expert_peers(problem)
    torch.testing.assert_close(peer.prepare()().float(), expected(problem), atol=0.05, rtol=0.05)


def test_marlin_runs_again_with_the_same_result(vllm: None) -> None:
    run = expert_peers(make_problem(nvfp4.quantize))[1].prepare()
    assert torch.equal(run(), run())


def test_one_token_to_one_expert(vllm: None) -> None:
    problem = make_problem(nvfp4.quantize)
    routing = Routing(problem.routing.ids[:1, :1], problem.routing.weights[:1, :1])
    alone = replace(problem, x=problem.x[:1], routing=routing)
    for peer in expert_peers(alone):
        torch.testing.assert_close(peer.prepare()().float(), expected(alone), atol=0.05, rtol=0.05)


@pytest.mark.skipif("vllm" in sys.modules, reason="vLLM is here")
def test_without_vllm() -> None:
    _, peer = expert_peers(make_problem(nvfp4.quantize))
    with pytest.raises(PeerMissingError, match="vllm cannot be imported"):
        peer.prepare()
