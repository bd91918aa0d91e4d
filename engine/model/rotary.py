"""Rotary embeddings: cos and sin of position * theta^(-2i / rotary_dim) for every position a model has.

Angles are computed in float64, and cos and sin rounded once. transformers multiplies in float32: at position
202,751 of GLM-4.7 its cos is off by up to 0.006, three times what rounding to bfloat16 costs, since float32
angles of that size have steps of 1/64, and frequencies are rounded before they are multiplied. That error is
noise in the distance between two tokens, by which alone attention sees positions, so it is left out rather
than copied. Up to position 512 the two agree to 2e-5.

The table is computed once, on the host: so a token's cos and sin are the same numbers on every device, and
whatever else is in its step. It takes 52 MB for GLM-4.7.
"""

from __future__ import annotations

import torch

from nybble.kernels.ops import RotaryAngles


def rotary_table(theta: float, rotary_dim: int, num_positions: int, device: torch.device) -> RotaryAngles:
    """float32 [num_positions, rotary_dim / 2] each, for `Ops.rotary_angles`."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angles = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1) * theta**-exponents
    return RotaryAngles(cos=angles.cos().float().to(device), sin=angles.sin().float().to(device))
