from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble.kernels.quantized_tensor import (
    E2M1_VALUES,
    NVFP4,
    Format,
    QuantizedTensor,
    concatenate_rows,
    stack,
    unpack_codes,
)


def _random(*shape: int, seed: int = 0) -> QuantizedTensor:
    """Any codes, positive block scales, and a global scale for each row."""
    *lead, columns = shape
    generator = torch.Generator().manual_seed(seed)
    return QuantizedTensor(
        codes=torch.randint(0, 256, (*lead, columns // 2), generator=generator, dtype=torch.uint8),
        block_scales=(torch.rand(*lead, columns // 16, generator=generator) * 400).to(torch.float8_e4m3fn),
        global_scales=torch.rand(*lead, generator=generator) + 0.01,
        format=NVFP4,
    )


def _e2m1(code: int) -> float:
    """From the bits: sign, exponent of bias 1, one mantissa bit."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -magnitude if code & 8 else magnitude


def test_values_are_those_of_the_bits() -> None:
    expected = [_e2m1(code) for code in range(16)]
    assert list(E2M1_VALUES) == expected
    assert str(E2M1_VALUES[8]) == "-0.0"


def test_every_code_unpacks_in_column_order() -> None:
    packed = torch.tensor([low | high << 4 for low in range(16) for high in range(16)], dtype=torch.uint8)
    expected = [_e2m1(code) for low in range(16) for high in range(16) for code in (low, high)]
    assert unpack_codes(packed).tolist() == expected


@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (2, 5, 32)])
def test_dequantizes_each_element_by_the_formula(shape: tuple[int, ...]) -> None:
    tensor = _random(*shape)
    weight = tensor.dequantize()
    assert weight.dtype == torch.float32
    assert tuple(weight.shape) == tensor.shape == shape
    codes, scales = tensor.codes.flatten(0, -2), tensor.block_scales.float().flatten(0, -2)
    globals_ = tensor.global_scales.flatten()
    for row, values in enumerate(weight.flatten(0, -2).tolist()):
        for column, value in enumerate(values):
            code = int(codes[row, column // 2]) >> 4 * (column % 2) & 0xF
            scale = scales[row, column // 16] * globals_[row]  # float32
            assert value == (_e2m1(code) * scale).item()


def test_dequantize_rounds_once_from_float32() -> None:
    tensor = _random(4, 64)
    assert torch.equal(tensor.dequantize(torch.bfloat16), tensor.dequantize().bfloat16())


def test_fused_rows_keep_their_own_global_scale() -> None:
    parts = [_random(3, 32, seed=0), _random(1, 32, seed=1), _random(2, 32, seed=2)]
    fused = concatenate_rows(parts)
    assert fused.shape == (6, 32)
    assert torch.equal(fused.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_fused_stacks_join_their_rows() -> None:
    parts = [_random(4, 3, 32, seed=0), _random(4, 2, 32, seed=1)]
    expected = torch.cat([part.dequantize() for part in parts], dim=1)
    assert torch.equal(concatenate_rows(parts).dequantize(), expected)


def test_stack_is_in_order() -> None:
    parts = [_random(3, 32, seed=seed) for seed in range(4)]
    stacked = stack(parts)
    assert stacked.shape == (4, 3, 32)
    assert torch.equal(stacked.dequantize(), torch.stack([part.dequantize() for part in parts]))


@pytest.mark.parametrize("join", [concatenate_rows, stack])
def test_formats_are_not_mixed(join: object) -> None:
    other = replace(_random(2, 32), format=Format("other", 4, 16, torch.float8_e4m3fn, has_global_scale=True))
    with pytest.raises(ValueError, match=r"cannot join formats \['nvfp4', 'other'\]"):
        join([_random(2, 32), other])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("part", "bad", "message"),
    [
        ("codes", torch.zeros(2, 16, dtype=torch.int8), r"codes is .*int8 \(2, 16\), expected torch.uint8"),
        ("codes", torch.zeros(3, 16, dtype=torch.uint8), r"block_scales is .* \(2, 2\), .* \(3, 2\)"),
        (
            "block_scales",
            torch.zeros(2, 1).to(torch.float8_e4m3fn),
            r"block_scales is .* \(2, 1\), expected .* \(2, 2\)",
        ),
        ("block_scales", torch.zeros(2, 2), r"block_scales is torch.float32 .* torch.float8_e4m3fn"),
        ("global_scales", torch.zeros(()), r"global_scales is torch.float32 \(\), expected .* \(2,\)"),
        ("global_scales", torch.zeros(2).half(), r"global_scales is torch.float16"),
        ("codes", torch.zeros(2, 12, dtype=torch.uint8), "24 columns are not a multiple of the nvfp4 block"),
    ],
)
def test_wrong_parts_are_named(part: str, bad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(_random(2, 32), **{part: bad})


def test_a_stack_dequantizes_as_its_matrices() -> None:
    parts = [_random(3, 32) for _ in range(4)]
    joined = stack(parts)
    assert torch.equal(
        joined.dequantize(torch.bfloat16), torch.stack([p.dequantize(torch.bfloat16) for p in parts])
    )
    assert torch.equal(joined[2].codes, parts[2].codes)
