from __future__ import annotations

import torch

from nybble.kernels import fp8


def test_each_row_has_its_own_scale() -> None:
    weight = torch.tensor([[1.0, -448.0, 3.0], [0.5, 0.25, -0.125], [0.0, 0.0, 0.0]])
    quantized = fp8.quantize(weight)
    assert quantized.global_scales is not None
    assert torch.equal(quantized.global_scales, torch.tensor([448.0, 0.5, 448.0]) / 448)
    assert quantized.dequantize()[0].tolist() == [1.0, -448.0, 3.0]
    assert quantized.dequantize()[2].tolist() == [0.0, 0.0, 0.0]


def test_gaussian_error_matches_the_format() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    error = (fp8.quantize(weight).dequantize() - weight).square().mean().sqrt() / weight.std()
    assert 0.025 < error < 0.028  # 2.65 % is what FP8 per channel costs on Gaussian weights


def test_nothing_becomes_nan() -> None:
    """E4M3 has no infinity: what rounds above 448 must saturate, not overflow."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 1e30
    assert fp8.quantize(weight).dequantize().isfinite().all()
