"""Peers of one matrix: torch's own, and vLLM's Marlin by a stand-in with its interface."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.kernels import mxfp4, nvfp4
from nybble.kernels.bench.linear_peers import MARLIN, LinearProblem, linear_peers
from nybble.kernels.bench.workload import PeerMissingError
from nybble.kernels.fp8 import quantize as quantize_fp8
from nybble.kernels.quantized_tensor import unpack_codes

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
DENSE = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))


def apply_marlin(
    x: Tensor, weight: Any, scale: Any, global_scale: Any, workspace: Any, n: int, k: int
) -> Tensor:
    """What the real one computes, of weights that `prepare` left as they are."""
    assert workspace == "workspace" and weight.shape == (n, k // 2)
    scales = (
        scale.float() * global_scale if global_scale is not None else scale.view(torch.float8_e8m0fnu).float()
    )
    blocks = unpack_codes(weight).view(n, scales.shape[1], -1)
    return (x.float() @ (blocks * scales.unsqueeze(2)).view(n, k).T).to(x.dtype)


@pytest.fixture
def marlin(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(MARLIN)
    module.prepare_fp4_layer_for_marlin = lambda layer: setattr(layer, "workspace", "workspace")  # type: ignore[attr-defined]
    module.apply_fp4_marlin_linear = apply_marlin  # type: ignore[attr-defined]
    names = MARLIN.split(".")
    for end in range(1, len(names)):
        monkeypatch.setitem(sys.modules, ".".join(names[:end]), ModuleType(names[end - 1]))
    monkeypatch.setitem(sys.modules, MARLIN, module)


@pytest.mark.parametrize("quantize", [nvfp4.quantize, mxfp4.quantize], ids=["nvfp4", "mxfp4"])
def test_fp4(quantize: Any, marlin: None) -> None:
    weight = quantize(DENSE)
    expected = X.float() @ weight.dequantize().T
    peers = linear_peers(LinearProblem(X, weight))
    assert [peer.name for peer in peers] == ["torch bf16", "vllm marlin"]
    for peer in peers:
        torch.testing.assert_close(peer.prepare()().float(), expected, atol=0.15, rtol=0.02)


def test_fp8() -> None:
    weight = quantize_fp8(DENSE)
    expected = X.float() @ weight.dequantize().T
    peers = linear_peers(LinearProblem(X, weight))
    assert [peer.name for peer in peers] == ["torch bf16", "torch scaled_mm"]
    for peer in peers:
        torch.testing.assert_close(peer.prepare()().float(), expected, atol=1.5, rtol=0.1)


def test_a_bfloat16_matrix_is_torch_s_in_our_backend_too() -> None:
    assert linear_peers(LinearProblem(X, DENSE.bfloat16())) == ()


@pytest.mark.skipif("vllm" in sys.modules, reason="vLLM is here")
def test_without_vllm() -> None:
    _, marlin = linear_peers(LinearProblem(X, nvfp4.quantize(DENSE)))
    with pytest.raises(PeerMissingError, match="vllm cannot be imported"):
        marlin.prepare()
