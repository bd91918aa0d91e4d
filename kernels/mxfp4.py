"""Quantize to MXFP4 (OCP Microscaling) as compressed-tensors and Quark do.

A block of 32 columns shares a power of two, stored as its exponent plus 127 (E8M0):

    block_scale = 2^(floor(log2(P)) - 2),  P = max |w| in the block, raised to the next power of two when
                                           its mantissa is 1.75 or more
    code        = the E2M1 value nearest to w / block_scale, ties to the even code, saturated at 6

P is found in the float32 bits: adding 2^21 to them carries into the exponent just from mantissa 1.75 on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.quantized_tensor import MXFP4, QuantizedTensor, nearest_codes, pack_codes

_BLOCK_SIZE = 32
_E2M1_MAX_EXPONENT = 2  # 6 = 1.5 * 2^2


def quantize(weight: Tensor) -> QuantizedTensor:
    """MXFP4 form of `weight`, a float tensor [rows, columns]."""
    blocks = torch.unflatten(weight.float(), -1, (-1, _BLOCK_SIZE))  # [rows, columns / 32, 32]
    block_scales = _block_scales(blocks)
    codes = nearest_codes(blocks / block_scales.float().unsqueeze(-1)).flatten(-2)
    return QuantizedTensor(
        codes=pack_codes(codes), block_scales=block_scales, global_scales=None, format=MXFP4
    )


def _block_scales(blocks: Tensor) -> Tensor:
    bits = blocks.abs().amax(dim=-1).view(torch.int32) + (1 << 21)
    # The exponent of float32 is biased by 127, as is that of E8M0. A block of zeros gets the smallest.
    exponents = (bits >> 23) - _E2M1_MAX_EXPONENT
    return exponents.clamp(0, 254).to(torch.uint8).view(torch.float8_e8m0fnu)
