"""Random FP4 weights and activations for tests of kernels, and float64 experts to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.quantized_tensor import MXFP4, NVFP4, QuantizedTensor, stack
from nybble.kernels.triton import activation_order
from nybble.kernels.triton.fp4_matrix import Fp4Matrix, pack_fp4

FORMATS = {"nvfp4": NVFP4, "mxfp4": MXFP4}
_E2M1_RMS = 2.9  # of all its codes


@dataclass(frozen=True)
class Form:
    """A format of weights and the 16-bit float that kernels make of them."""

    format: str
    is_float16: bool

    def __str__(self) -> str:
        return f"{self.format}-{'float16' if self.is_float16 else 'bfloat16'}"


# Before 10.0 there is no instruction that converts codes to float16.
_ARE_FLOAT16 = (False, True) if max(ARCHES) >= 100 else (False,)
FORMS = [Form(format, is_float16) for format in FORMATS for is_float16 in _ARE_FLOAT16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """float32 on DEVICE, of another kind for each shape."""
    return torch.randn(*shape, generator=_generator(seed, *shape)).to(DEVICE)


def random_weight(form: Form, rows: int, columns: int, seed: int = 0) -> QuantizedTensor:
    """All codes, scales that differ; products of a row with normal activations are about normal."""
    generator = _generator(seed, rows, columns)
    codes = torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    blocks, size = (rows, columns // FORMATS[form.format].block_size), 1 / (_E2M1_RMS * columns**0.5)
    if FORMATS[form.format] is MXFP4:
        powers = math.floor(math.log2(size)) + 127 + torch.randint(-1, 3, blocks, generator=generator)
        return QuantizedTensor(codes, powers.to(torch.uint8).view(torch.float8_e8m0fnu), None, MXFP4).to(
            DEVICE
        )
    scales = (0.5 + torch.rand(blocks, generator=generator)).to(torch.float8_e4m3fn)
    row_scales = size * (0.5 + torch.rand(rows, generator=generator))
    return QuantizedTensor(codes, scales, row_scales, NVFP4).to(DEVICE)


def random_stack(form: Form, num_experts: int, rows: int, columns: int) -> QuantizedTensor:
    return stack([random_weight(form, rows, columns, seed) for seed in range(num_experts)])


def packed(weight: QuantizedTensor | None, form: Form) -> Fp4Matrix | None:
    return None if weight is None else pack_fp4(weight, form.is_float16)


def in_fragment_order(x: Tensor) -> Tensor:
    """x [..., K] as kernels take it, padded to whole blocks: a slice of a tensor that is NaN elsewhere."""
    padding = activation_order.padded_width(x.shape[-1]) - x.shape[-1]
    stored = activation_order.to_fragment_order(F.pad(x, (0, padding)))
    rows = stored.reshape(-1, stored.shape[-1])
    around = rows.new_full((len(rows) + 3, rows.shape[1] + 128), torch.nan)
    around[: len(rows), : rows.shape[1]] = rows
    return around[: len(rows), : rows.shape[1]].unflatten(0, x.shape[:-1])


def random_ids(num_tokens: int, top_k: int, experts: range, seed: int = 0) -> Tensor:
    """int32 [T, top_k], different ones for a token."""
    generator = _generator(seed, num_tokens, top_k)
    rows = [torch.randperm(len(experts), generator=generator)[:top_k] for _ in range(num_tokens)]
    return (torch.stack(rows) + experts.start).int().to(DEVICE)


def product_reference(x: Tensor, weight: Tensor) -> Tensor:
    """float64 [..., N] of x [..., K] and a dequantized matrix [N, K], on the CPU."""
    return x.cpu().double() @ weight.cpu().double().T


def gate_up_reference(x: Tensor, gate_up: Tensor) -> Tensor:
    """float64 [..., I] of x [..., K]: silu(gate) * up, of a dequantized matrix [2I, K]."""
    gate, up = product_reference(x, gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(seed * 7919**i for i, seed in enumerate(seeds)) % 2**63)
