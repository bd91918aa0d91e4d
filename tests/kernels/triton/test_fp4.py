"""What `unpack_weights` makes of every byte with every scale, and how results are narrowed."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from fp4_weights import FORMS, Form, packed, random_weight
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import DEVICE

from nybble.kernels.quantized_tensor import MXFP4, NVFP4, QuantizedTensor
from nybble.kernels.triton import activation_order
from nybble.kernels.triton.fp4 import joined, narrow, quarter, scale_offset, unpack_weights
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.launch import launch

NVFP4_FORMS = [form for form in FORMS if form.format == "nvfp4"]
MXFP4_FORMS = [form for form in FORMS if form.format == "mxfp4"]
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


@triton.jit
def _unpack_kernel(
    code_ptr, scale_ptr, out_ptr, code_stride, scale_stride, out_stride,
    R: tl.constexpr, BLOCK_SIZE: tl.constexpr, FLOAT16: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """A program unpacks 64 columns of R rows."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    block = tl.program_id(1)
    codes = tl.load(code_ptr + row * code_stride + block * 16 + tl.arange(0, 16)[None, :])
    BLOCKS: tl.constexpr = 64 // BLOCK_SIZE
    word = block // 4 * 16 * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    words = tl.load(scale_ptr + scale_offset(row, scale_stride, BLOCK_SIZE) + word)
    weights = unpack_weights(codes, words >> (block % 4 * 8) & 0xFF, R, BLOCK_SIZE, FLOAT16)
    out_ptr += row * out_stride + block * 64
    if JOINED:
        tl.store(out_ptr + tl.arange(0, 64)[None, :], joined(weights, R))
    else:
        for q in tl.static_range(4):
            tl.store(out_ptr + quarter(q)[None, :], weights[q])


@triton.jit
def _narrow_kernel(in_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, narrow(tl.load(in_ptr + at), out_ptr))


def unpacked(matrix: Fp4Matrix, block_rows: int, is_joined: bool = False) -> Tensor:
    """float32 [N, K]: what the kernels multiply by, row scales included, in natural order."""
    dtype = torch.float16 if matrix.is_float16 else torch.bfloat16
    out = torch.empty(matrix.num_rows, matrix.width, dtype=dtype, device=DEVICE)
    launch(
        _unpack_kernel,
        (matrix.num_rows // block_rows, matrix.width // 64),
        *(matrix.codes.view(torch.uint16), matrix.scale_words, out),
        *(matrix.width // 4, matrix.scale_words.stride(0), matrix.width),
        R=block_rows,
        BLOCK_SIZE=matrix.block_size,
        FLOAT16=matrix.is_float16,
        JOINED=is_joined,
    )
    return activation_order.from_fragment_order(out).float() * matrix.row_scales.unsqueeze(1)


def every_byte(num_rows: int) -> Tensor:
    """uint8 [num_rows, 256], each row beginning at another byte: so bytes stand at all places of a word."""
    return torch.stack([EVERY_BYTE.roll(row) for row in range(num_rows)])


@pytest.mark.parametrize("form", NVFP4_FORMS, ids=str)
def test_every_byte_with_every_nvfp4_scale(form: Form) -> None:
    """Scales go from 0 to 448, neighbouring blocks have different ones; the last is there twice."""
    scale_bytes = (torch.arange(128).unsqueeze(1) + torch.arange(32)) % 127
    weight = QuantizedTensor(
        codes=every_byte(128),
        block_scales=scale_bytes.to(torch.uint8).view(torch.float8_e4m3fn),
        global_scales=torch.full((128,), 0.25),
        format=NVFP4,
    ).to(DEVICE)
    assert unpacked(packed(weight, form), 128).equal(weight.dequantize())


@pytest.mark.parametrize("form", MXFP4_FORMS, ids=str)
def test_every_byte_with_every_mxfp4_scale(form: Form) -> None:
    """From 2^-127 to 2^125, of which six is still a float32; a row spans up to eight powers of two."""
    largest = torch.arange(256).clamp(max=252).unsqueeze(1)
    scale_bytes = (largest - torch.arange(16) % 8).clamp(min=0).to(torch.uint8)
    weight = QuantizedTensor(every_byte(256), scale_bytes.view(torch.float8_e8m0fnu), None, MXFP4).to(DEVICE)
    assert unpacked(packed(weight, form), 128).equal(weight.dequantize())


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize("block_rows", [16, 32, 64])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_few_rows(form: Form, block_rows: int, is_joined: bool) -> None:
    """Up to the rounding of a row's scale: products are exact, and multiplied by it once."""
    weight = random_weight(form, 64, 128)
    torch.testing.assert_close(
        unpacked(packed(weight, form), block_rows, is_joined), weight.dequantize(), rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrowing(dtype: torch.dtype) -> None:
    """To nearest; float16 has no infinity here, since an expert's activations may pass its largest number."""
    values = torch.tensor([0.1, -3.14159, 65504.0, 65519.0, 65520.0, -70000.0, 3e38, -3e38], device=DEVICE)
    out = torch.empty(len(values), dtype=dtype, device=DEVICE)
    launch(_narrow_kernel, (1,), values, out, BLOCK=len(values))
    wanted = values.clamp(-65504, 65504) if dtype == torch.float16 else values
    assert out.equal(wanted.to(dtype))
