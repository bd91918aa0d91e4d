"""Quantize to FP8: E4M3 elements, one float32 scale for each row (output channel).

scale = max |w| in the row / 448;  code = E4M3(w / scale), rounded to nearest, ties to even
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.quantized_tensor import E4M3_MAX, FP8, QuantizedTensor


def quantize(weight: Tensor) -> QuantizedTensor:
    """FP8 form of `weight`, a float tensor [rows, columns]. A row of zeros gets scale 1."""
    weight = weight.float()
    amax = weight.abs().amax(dim=-1)
    scales = torch.where(amax == 0, torch.ones_like(amax), amax / E4M3_MAX)
    codes = (weight / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return QuantizedTensor(codes=codes, block_scales=None, global_scales=scales, format=FP8)
