"""Products with one matrix by other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.bench.correctness import QUANTIZED_TO_8_BITS
from nybble.kernels.bench.peers import library, require
from nybble.kernels.bench.workload import Peer
from nybble.kernels.quantized_tensor import FP8, NVFP4, QuantizedTensor

MARLIN = "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4"


@dataclass(frozen=True)
class LinearProblem:
    """x [T, K] in natural order; weight [N, K]."""

    x: Tensor
    weight: QuantizedTensor | Tensor


def linear_peers(problem: LinearProblem) -> tuple[Peer, ...]:
    """A bfloat16 matrix has none: its product is torch's own in our backend, too."""
    weight = problem.weight
    if isinstance(weight, Tensor):
        return ()
    bfloat16 = Peer("torch bf16", lambda: _bfloat16(problem.x, weight))
    if weight.format is FP8:
        return (bfloat16, Peer("torch scaled_mm", lambda: _scaled_mm(problem.x, weight), QUANTIZED_TO_8_BITS))
    return (bfloat16, Peer("vllm marlin", lambda: marlin_linear(problem.x, weight)))


def _bfloat16(x: Tensor, weight: QuantizedTensor) -> Callable[[], Tensor]:
    """The same weights, dequantized: what one has without FP4, in four times the memory."""
    dense = weight.dequantize(x.dtype)
    return lambda: F.linear(x, dense)


def _scaled_mm(x: Tensor, weight: QuantizedTensor) -> Callable[[], Tensor]:
    """Activations in E4M3, too, a scale for each token and each row; quantizing them is timed."""
    require(hasattr(torch, "_scaled_mm"), "this torch has no _scaled_mm")
    is_capable = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9)
    require(is_capable, "FP8 products need compute capability 8.9")
    codes, row_scales = weight.codes.T, weight.row_factors().view(1, -1)

    def run() -> Tensor:
        token_scales = x.abs().amax(dim=1, keepdim=True).float() / 448
        quantized = (x / token_scales).to(torch.float8_e4m3fn)
        return torch._scaled_mm(quantized, codes, token_scales, row_scales, out_dtype=torch.bfloat16)

    return run


def marlin_linear(x: Tensor, weight: QuantizedTensor) -> Callable[[], Tensor]:
    """vLLM's Marlin kernel; as its layers call it, of vLLM's main branch in 2026."""
    marlin = library(MARLIN)
    num_rows, width = weight.shape
    layer = _marlin_layer(weight, x.dtype)
    marlin.prepare_fp4_layer_for_marlin(layer)
    global_scale = layer.weight_global_scale if weight.format is NVFP4 else None
    arguments = layer.weight, layer.weight_scale, global_scale, layer.workspace, num_rows, width

    def run() -> Tensor:
        product: Tensor = marlin.apply_fp4_marlin_linear(x, *arguments)
        return product

    return run


def _marlin_layer(weight: QuantizedTensor, dtype: torch.dtype) -> Any:
    num_rows, width = weight.shape
    layer = SimpleNamespace(
        output_size_per_partition=num_rows,
        input_size_per_partition=width,
        params_dtype=dtype,
        weight=weight.codes,
        weight_scale=marlin_scales(weight),
    )
    if weight.format is NVFP4:
        layer.weight_global_scale = weight.row_factors()[0]
    return layer


def marlin_scales(weight: QuantizedTensor) -> Tensor:
    """Block scales in the dtype that vLLM loads them in."""
    assert weight.block_scales is not None
    return weight.block_scales if weight.format is NVFP4 else weight.block_scales.view(torch.uint8)
