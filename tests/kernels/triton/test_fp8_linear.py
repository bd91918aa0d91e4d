"""Products with FP8 matrices against float64 on the same operands."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from closeness import assert_close
from fp4_weights import in_fragment_order, normal, product_reference
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels import fp8
from nybble.kernels.quantized_tensor import FP8, QuantizedTensor
from nybble.kernels.triton import activation_order
from nybble.kernels.triton.fp8_linear import (
    Fp8LinearLaunch,
    fp8_linear,
    fp8_linear_launch,
    half,
    joined,
    unpack_codes,
)
from nybble.kernels.triton.fp8_matrix import Fp8Matrix, pack_fp8
from nybble.kernels.triton.launch import launch as start
from nybble.kernels.triton.launch import recorded_launches

# 8.9 is the first that converts codes to float16.
ARE_FLOAT16 = [False, True] if max(ARCHES) >= 90 else [False]
SHAPES = [(1, 16, 64), (3, 40, 96), (9, 70, 320), (17, 130, 192), (2, 1, 640)]  # tokens, rows, columns
LAUNCHES = [
    Fp8LinearLaunch(block_rows=32, block_tokens=8, splits=4, is_joined=False, num_warps=4, num_stages=3),
    Fp8LinearLaunch(block_rows=16, block_tokens=16, splits=8, is_joined=False, num_warps=8, num_stages=3),
    Fp8LinearLaunch(block_rows=128, block_tokens=16, splits=1, is_joined=False, num_warps=4, num_stages=3),
    Fp8LinearLaunch(block_rows=128, block_tokens=16, splits=1, is_joined=True, num_warps=4, num_stages=3),
]
GLM_MATRICES = [(14336, 5120), (5120, 12288), (24576, 5120), (151552, 5120), (3072, 5120), (5120, 1536)]


@triton.jit
def _unpack_kernel(code_ptr, out_ptr, R: tl.constexpr, FLOAT16: tl.constexpr, JOINED: tl.constexpr):
    row = tl.arange(0, R)[:, None]
    codes = tl.load(code_ptr + row * 64 + tl.arange(0, 64)[None, :])
    weights = unpack_codes(codes, R, FLOAT16)
    if JOINED:
        tl.store(out_ptr + row * 128 + tl.arange(0, 128)[None, :], joined(weights, R))
    else:
        for e in tl.static_range(2):
            tl.store(out_ptr + row * 128 + half(e)[None, :], weights[e])


def launch_id(launch: Fp8LinearLaunch) -> str:
    return f"{launch.block_rows}x{launch.block_tokens}-{launch.splits}{'j' * launch.is_joined}"


def random_weight(num_rows: int, num_columns: int) -> QuantizedTensor:
    return fp8.quantize(normal(num_rows, num_columns, seed=1) * num_columns**-0.5)


def linear(
    x: Tensor, matrix: Fp8Matrix, launch: Fp8LinearLaunch, dtype: torch.dtype = torch.float32
) -> Tensor:
    return fp8_linear(in_fragment_order(x), matrix, dtype, launch=launch)


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize("is_float16", ARE_FLOAT16)
def test_every_code_is_unpacked(is_float16: bool, is_joined: bool) -> None:
    """All but the two that are not numbers, each in several places."""
    numbers = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    codes = torch.stack([numbers.roll(row)[:128] for row in range(256)]).to(DEVICE)
    weight = QuantizedTensor(codes.view(torch.float8_e4m3fn), None, torch.ones(256, device=DEVICE), FP8)
    dtype = torch.float16 if is_float16 else torch.bfloat16
    out = torch.empty(256, 128, dtype=dtype, device=DEVICE)
    codes = pack_fp8(weight, is_float16).codes.view(torch.uint16)
    start(_unpack_kernel, (1,), codes, out, R=256, FLOAT16=is_float16, JOINED=is_joined)
    assert activation_order.from_fragment_order(out).float().equal(weight.dequantize())


@pytest.mark.parametrize("launch", LAUNCHES, ids=launch_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_float16", ARE_FLOAT16)
def test_products(is_float16: bool, shape: tuple[int, int, int], launch: Fp8LinearLaunch) -> None:
    num_tokens, num_rows, num_columns = shape
    weight, x = random_weight(num_rows, num_columns), normal(num_tokens, num_columns)
    expected = product_reference(x, weight.dequantize())
    assert_close(linear(x, pack_fp8(weight, is_float16), launch), expected, max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("launch", LAUNCHES, ids=launch_id)
@pytest.mark.parametrize("is_float16", ARE_FLOAT16)
def test_sixteen_bit_activations(is_float16: bool, launch: Fp8LinearLaunch, dtype: torch.dtype) -> None:
    """Codes are exact in both floats, so activations are never rounded, only results."""
    weight, x = random_weight(70, 320), normal(9, 320).to(dtype)
    expected = product_reference(x, weight.dequantize())
    matrix = pack_fp8(weight, is_float16)
    assert_close(linear(x, matrix, launch), expected, max_error=5e-6, rms_error=1e-6)
    assert_close(linear(x, matrix, launch, dtype), expected, max_error=2e-2, rms_error=3e-3)


@pytest.mark.parametrize("num_tokens", [1, 9, 17, 33])
@pytest.mark.parametrize("arch", ARCHES)
def test_launches_that_are_chosen(arch: int, num_tokens: int) -> None:
    weight, x = random_weight(72, 192), normal(num_tokens, 192)
    launch = fp8_linear_launch(num_tokens, 72, 192, arch)
    expected = product_reference(x, weight.dequantize())
    assert_close(linear(x, pack_fp8(weight, False), launch), expected, max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 16, 17, 64, 257, 4096, 16384])
@pytest.mark.parametrize("arch", ARCHES)
def test_launches_are_possible(arch: int, num_tokens: int) -> None:
    for (num_rows, width), shards in ((m, s) for m in GLM_MATRICES for s in (1, 2, 4, 8)):
        launch = fp8_linear_launch(num_tokens, num_rows // shards, width, arch)
        sizes = launch.block_rows, launch.block_tokens, launch.splits, launch.num_warps
        assert all(is_power_of_two(size) for size in sizes)
        assert not (launch.is_joined and launch.splits > 1)
        assert launch.block_rows >= 16 and launch.block_tokens >= 8
        assert launch.splits in (1, launch.num_warps)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("arch", ARCHES)
def test_launches_fill_a_gpu(arch: int) -> None:
    """However few the tokens: no matrix of GLM-4.7 is so small that most of a GPU is idle."""
    for num_tokens in (1, 8, 64, 512):
        for num_rows, width in ((1792, 5120), (5120, 1536), (14336, 5120)):
            launch = fp8_linear_launch(num_tokens, num_rows, width, arch)
            blocks = triton.cdiv(num_rows, launch.block_rows), triton.cdiv(num_tokens, launch.block_tokens)
            assert blocks[0] * blocks[1] >= 112


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 73, 150])
def test_every_tile_is_done_once(num_tokens: int) -> None:
    """Eight tiles of tokens are a group; the last group may have fewer."""
    weight, x = random_weight(20, 64), normal(num_tokens, 64)
    y = linear(x, pack_fp8(weight, False), LAUNCHES[0])
    assert_close(y, product_reference(x, weight.dequantize()), max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("launch", LAUNCHES, ids=launch_id)
def test_two_runs_are_equal(launch: Fp8LinearLaunch) -> None:
    matrix, x = pack_fp8(random_weight(48, 640), False), normal(5, 640)
    assert linear(x, matrix, launch).equal(linear(x, matrix, launch))


@pytest.mark.parametrize("launch", LAUNCHES, ids=launch_id)
def test_float16_results_are_finite(launch: Fp8LinearLaunch) -> None:
    weight = random_weight(32, 128)
    x = 65504 * torch.sign(weight.dequantize()[:4]).half()  # products with row t of token t add up
    y = linear(x, pack_fp8(weight, ARE_FLOAT16[-1]), launch, torch.float16)
    expected = product_reference(x, weight.dequantize()).clamp(-65504, 65504)
    assert (expected.diag() == 65504).all()
    assert_close(y, expected, max_error=2e-2, rms_error=3e-3)


def test_no_tokens() -> None:
    assert linear(normal(0, 128), pack_fp8(random_weight(32, 128), False), LAUNCHES[0]).shape == (0, 32)


@pytest.mark.parametrize("arch", ARCHES)
def test_meta_tensors_are_one_launch(arch: int) -> None:
    codes = torch.empty(14336, 5120, dtype=torch.uint8, device="meta")
    matrix = Fp8Matrix(codes, torch.empty(14336, device="meta"), arch >= 100, (14336, 5120))
    x = torch.empty(7, 5120, dtype=torch.bfloat16, device="meta")
    with recorded_launches() as launches:
        y = fp8_linear(x, matrix, torch.bfloat16, launch=fp8_linear_launch(7, 14336, 5120, arch))
    assert len(launches) == 1
    assert y.shape == (7, 14336) and y.dtype == torch.bfloat16
