"""Products with FP4 matrices against float64 on the same operands."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from fp4_weights import FORMS, Form, in_fragment_order, normal, packed, product_reference, random_weight
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels.triton.fp4_linear import Fp4LinearLaunch, fp4_linear, fp4_linear_launch
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.launch import recorded_launches

SHAPES = [(1, 16, 64), (3, 40, 96), (9, 70, 320), (17, 130, 192), (2, 1, 640)]  # tokens, rows, columns
LAUNCHES = [
    Fp4LinearLaunch(block_rows=32, block_tokens=8, splits=4, is_joined=False, num_warps=4, num_stages=3),
    Fp4LinearLaunch(block_rows=64, block_tokens=16, splits=2, is_joined=False, num_warps=2, num_stages=3),
    Fp4LinearLaunch(block_rows=128, block_tokens=16, splits=1, is_joined=False, num_warps=4, num_stages=3),
    Fp4LinearLaunch(block_rows=128, block_tokens=16, splits=1, is_joined=True, num_warps=4, num_stages=3),
]
GLM_MATRICES = [(14336, 5120), (5120, 12288), (24576, 5120), (151552, 5120)]  # rows may be split 8 ways


def launch_id(launch: Fp4LinearLaunch) -> str:
    return f"{launch.block_rows}x{launch.block_tokens}-{launch.splits}{'j' * launch.is_joined}"


def linear(
    x: Tensor, matrix: Fp4Matrix, launch: Fp4LinearLaunch, dtype: torch.dtype = torch.float32
) -> Tensor:
    return fp4_linear(in_fragment_order(x), matrix, dtype, launch=launch)


@pytest.mark.parametrize("launch", LAUNCHES, ids=launch_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products(form: Form, shape: tuple[int, int, int], launch: Fp4LinearLaunch) -> None:
    num_tokens, num_rows, num_columns = shape
    weight, x = random_weight(form, num_rows, num_columns), normal(num_tokens, num_columns)
    expected = product_reference(x, weight.dequantize())
    assert_close(linear(x, packed(weight, form), launch), expected, max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("launch", LAUNCHES[1:], ids=launch_id)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sixteen_bit_activations(form: Form, launch: Fp4LinearLaunch, dtype: torch.dtype) -> None:
    weight, x = random_weight(form, 70, 320), normal(9, 320).to(dtype)
    expected = product_reference(x, weight.dequantize())
    matrix = packed(weight, form)
    assert_close(linear(x, matrix, launch), expected, max_error=1e-2, rms_error=3e-3)
    assert_close(linear(x, matrix, launch, dtype), expected, max_error=2e-2, rms_error=3e-3)


@pytest.mark.parametrize("form", [form for form in FORMS if form.is_float16], ids=str)
def test_activations_beyond_float16(form: Form) -> None:
    """Only bfloat16 has such numbers; they become the largest that float16 has."""
    weight, x = random_weight(form, 40, 128), (1e4 * normal(9, 128)).bfloat16()
    x[0, 3], x[2, 70] = 1e6, -3e38
    expected = product_reference(x.clamp(-65504, 65504), weight.dequantize())
    assert_close(linear(x, packed(weight, form), LAUNCHES[2]), expected, max_error=1e-2, rms_error=3e-3)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_activations_of_its_own_type_are_not_rounded(form: Form) -> None:
    dtype = torch.float16 if form.is_float16 else torch.bfloat16
    weight, x = random_weight(form, 70, 320), normal(9, 320).to(dtype)
    expected = product_reference(x, weight.dequantize())
    assert_close(linear(x, packed(weight, form), LAUNCHES[0]), expected, max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 8, 11, 17, 65])
@pytest.mark.parametrize("arch", ARCHES)
def test_launches_that_are_chosen(arch: int, num_tokens: int) -> None:
    form = FORMS[0]
    weight, x = random_weight(form, 72, 192), normal(num_tokens, 192)
    launch = fp4_linear_launch(num_tokens, 72, 192, arch)
    expected = product_reference(x, weight.dequantize())
    assert_close(linear(x, packed(weight, form), launch), expected, max_error=5e-6, rms_error=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 16, 17, 64, 65, 256, 257, 4096, 16384])
@pytest.mark.parametrize("arch", ARCHES)
def test_launches_are_possible(arch: int, num_tokens: int) -> None:
    for (num_rows, width), shards in ((m, s) for m in GLM_MATRICES for s in (1, 2, 4, 8)):
        launch = fp4_linear_launch(num_tokens, num_rows // shards, width, arch)
        assert launch.block_rows % 16 == 0
        sizes = launch.block_rows, launch.block_tokens, launch.splits, launch.num_warps
        assert all(is_power_of_two(size) for size in sizes)
        assert not (launch.is_joined and launch.splits > 1)
        assert launch.block_tokens >= 8 and launch.block_tokens < 2 * max(8, num_tokens)
        assert launch.splits in (1, launch.num_warps)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("launch", LAUNCHES, ids=launch_id)
def test_two_runs_are_equal(launch: Fp4LinearLaunch) -> None:
    matrix, x = packed(random_weight(FORMS[0], 48, 640), FORMS[0]), normal(5, 640, seed=1)
    assert linear(x, matrix, launch).equal(linear(x, matrix, launch))


@pytest.mark.parametrize("launch", LAUNCHES, ids=launch_id)
def test_float16_results_are_finite(launch: Fp4LinearLaunch) -> None:
    form = FORMS[-1]
    weight = random_weight(form, 32, 128)
    x = 65504 * torch.sign(weight.dequantize()[:4]).half()  # products with row t of token t add up
    y = linear(x, packed(weight, form), launch, torch.float16)
    expected = product_reference(x, weight.dequantize()).clamp(-65504, 65504)
    assert (expected.diag() == 65504).all()
    assert_close(y, expected, max_error=2e-2, rms_error=3e-3)


def test_no_tokens() -> None:
    matrix = packed(random_weight(FORMS[0], 32, 128), FORMS[0])
    assert linear(normal(0, 128), matrix, LAUNCHES[0]).shape == (0, 32)


@pytest.mark.parametrize("arch", ARCHES)
def test_meta_tensors_are_one_launch(arch: int) -> None:
    codes = torch.empty(14336, 2560, dtype=torch.uint8, device="meta")
    scale_words = torch.empty(896, 20, 64, dtype=torch.int32, device="meta")
    row_scales = torch.empty(14336, device="meta")
    matrix = Fp4Matrix(codes, scale_words, row_scales, 16, arch >= 100, (14336, 5120))
    x = torch.empty(7, 5120, dtype=torch.bfloat16, device="meta")
    with recorded_launches() as launches:
        y = fp4_linear(x, matrix, torch.bfloat16, launch=fp4_linear_launch(7, 14336, 5120, arch))
    assert len(launches) == 1
    assert y.shape == (7, 14336) and y.dtype == torch.bfloat16


def test_device() -> None:
    assert (
        linear(normal(1, 64), packed(random_weight(FORMS[0], 16, 64), FORMS[0]), LAUNCHES[0]).device == DEVICE
    )
