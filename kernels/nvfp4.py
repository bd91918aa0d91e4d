"""Quantize to NVFP4 as NVIDIA's ModelOpt does, byte for byte.

A block of 16 columns shares an E4M3 scale; a matrix shares a float32 scale. With A = max |w| of the
matrix (of gate and up together, since they share it):

    global_scale = A / (6 * 448)
    block_scale  = E4M3(max |w| in the block / (6 * global_scale)), in [2^-9, 448]
    code         = the E2M1 value nearest to w / (block_scale * global_scale), ties to the even code

so that the largest weight of the matrix is 6 * 448 * global_scale exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.quantized_tensor import (
    E2M1_MAX,
    E4M3_MAX,
    NVFP4,
    QuantizedTensor,
    nearest_codes,
    pack_codes,
)

E4M3_MIN = 2.0**-9  # smallest positive
_BLOCK_SIZE = 16


def global_scale(*weights: Tensor) -> Tensor:
    """float32 [] scale shared by `weights`. All-zero weights get 1, so that nothing divides by 0."""
    amax = torch.stack([w.abs().amax().float() for w in weights]).amax()
    return torch.where(amax == 0, torch.ones_like(amax), amax / (E2M1_MAX * E4M3_MAX))


def quantize(weight: Tensor, scale: Tensor | None = None) -> QuantizedTensor:
    """NVFP4 form of `weight`, a float tensor [rows, columns]; `scale` is its global scale, float32 []."""
    weight = weight.float()
    scale = global_scale(weight) if scale is None else scale
    blocks = torch.unflatten(weight, -1, (-1, _BLOCK_SIZE))  # [rows, columns / 16, 16]
    block_scales = _block_scales(blocks, scale)
    codes = nearest_codes(blocks / (block_scales.float() * scale).unsqueeze(-1)).flatten(-2)
    return QuantizedTensor(
        codes=pack_codes(codes),
        block_scales=block_scales,
        global_scales=scale.expand(weight.shape[:-1]).contiguous(),
        format=NVFP4,
    )


def _block_scales(blocks: Tensor, scale: Tensor) -> Tensor:
    exact = blocks.abs().amax(dim=-1) / (E2M1_MAX * scale)
    exact = torch.where(exact == 0, torch.ones_like(exact), exact)
    return exact.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
