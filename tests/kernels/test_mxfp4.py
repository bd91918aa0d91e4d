from __future__ import annotations

import pytest
import torch

from nybble.kernels import mxfp4
from nybble.kernels.quantized_tensor import MXFP4, QuantizedTensor, pack_codes

_FIRST = [0, 0.01, -0.01, 0.05, -0.1, 0.2, 0.3, -0.45, 0.6, 0.75, -0.9, 1, -1.2, 1.5, -2, 3]
# The golden vector of the NVFP4 recipe, here as one block of 32.
GOLDEN = torch.tensor([[*_FIRST, *((i - 8) * 0.001 for i in range(16))]]).bfloat16()


def _scale_bytes(weight: QuantizedTensor) -> list[list[int]]:
    assert weight.block_scales is not None
    rows: list[list[int]] = weight.block_scales.view(torch.uint8).tolist()
    return rows


def test_golden_vector() -> None:
    quantized = mxfp4.quantize(GOLDEN)
    assert quantized.codes.numpy().tobytes().hex() == "000818a1324c5c7e8888888800000000"
    assert _scale_bytes(quantized) == [[126]]


@pytest.mark.parametrize(
    ("largest", "byte"),
    [(3.49, 126), (3.5, 127), (-3.5, 127), (6.0, 127), (6.99, 127), (7.0, 128), (1.0, 125)],
)
def test_scale_rounds_up_from_mantissa_one_and_three_quarters(largest: float, byte: int) -> None:
    weight = torch.zeros(1, 32)
    weight[0, 5] = largest
    assert _scale_bytes(mxfp4.quantize(weight)) == [[byte]]


def test_saturates_at_six() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([3.49, -3.49])  # 6.98 of a scale of one half
    assert mxfp4.quantize(weight).dequantize()[0, :2].tolist() == [3.0, -3.0]


def test_gaussian_error_matches_the_format() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    error = (mxfp4.quantize(weight).dequantize() - weight).square().mean().sqrt() / weight.std()
    assert 0.105 < error < 0.12  # 11.2 % is what MXFP4 costs on Gaussian weights


def test_every_scale_decodes_to_its_power_of_two() -> None:
    exponents = torch.arange(255, dtype=torch.uint8).reshape(-1, 1)
    ones = pack_codes(torch.full((255, 32), 2, dtype=torch.uint8))  # code 2 is 1.0
    decoded = QuantizedTensor(ones, exponents.view(torch.float8_e8m0fnu), None, MXFP4).dequantize(
        torch.float64
    )
    assert decoded[:, 0].tolist() == [2.0 ** (byte - 127) for byte in range(255)]


def test_zero_block_stays_zero() -> None:
    assert not mxfp4.quantize(torch.zeros(2, 64)).dequantize().any()
