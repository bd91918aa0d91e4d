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

from nybble.kernels.quantized_tensor import E2M1_MAX, NVFP4, QuantizedTensor

E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # smallest positive
# Halfway points between neighbouring E2M1 magnitudes. A value is coded by how many it exceeds; at the
# second, fourth and sixth a tie goes up, to the even code.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)


def global_scale(*weights: Tensor) -> Tensor:
    """float32 [] scale shared by `weights`. All-zero weights get 1, so that nothing divides by 0."""
    amax = torch.stack([w.abs().amax().float() for w in weights]).amax()
    return torch.where(amax == 0, torch.ones_like(amax), amax / (E2M1_MAX * E4M3_MAX))


def quantize(weight: Tensor, scale: Tensor | None = None) -> QuantizedTensor:
    """NVFP4 form of `weight`, a float tensor [rows, columns]; `scale` is its global scale, float32 []."""
    weight = weight.float()
    scale = global_scale(weight) if scale is None else scale
    blocks = torch.unflatten(weight, -1, (-1, NVFP4.block_size))  # [rows, columns / 16, 16]
    block_scales = _block_scales(blocks, scale)
    codes = _nearest_codes(blocks / (block_scales.float() * scale).unsqueeze(-1)).flatten(-2)
    return QuantizedTensor(
        codes=codes[..., 1::2] << 4 | codes[..., 0::2],
        block_scales=block_scales,
        global_scales=scale.expand(weight.shape[:-1]).contiguous(),
        format=NVFP4,
    )


def _block_scales(blocks: Tensor, scale: Tensor) -> Tensor:
    exact = blocks.abs().amax(dim=-1) / (E2M1_MAX * scale)
    exact = torch.where(exact == 0, torch.ones_like(exact), exact)
    return exact.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def _nearest_codes(values: Tensor) -> Tensor:
    midpoints = torch.tensor(_MIDPOINTS, device=values.device)
    magnitudes = values.abs()
    codes = torch.bucketize(magnitudes, midpoints).to(torch.uint8)
    for tie in _TIES_UP:
        codes += magnitudes == tie
    return codes | (values < 0).to(torch.uint8) << 3
