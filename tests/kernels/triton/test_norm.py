"""The fused norm against the reference's: sum, norm, order of columns, and quantized copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from poison import poisoned as poisoned
from rounding import assert_rounds_alike
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels import reference_ops
from nybble.kernels.ops import RmsNorm
from nybble.kernels.quantized_tensor import NVFP4, Format
from nybble.kernels.triton.activation_order import padded_width, to_fragment_order
from nybble.kernels.triton.activation_quantization import MXFP8, quantization_launch, quantize_activations
from nybble.kernels.triton.norm import quantized_residual_rms_norm, residual_rms_norm
from nybble.kernels.triton.row import row_launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONVERTING = [arch for arch in ARCHES if arch >= 90]


def _normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def _norm(width: int, dtype: torch.dtype) -> RmsNorm:
    return RmsNorm(_normal(width, seed=1, dtype=dtype), 1e-5)


def _fused(
    hidden: Tensor,
    update: Tensor | None,
    norm: RmsNorm,
    width: int,
    fragment_order: bool = False,
    arch: int = ARCHES[0],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    return residual_rms_norm(
        hidden,
        update,
        norm,
        fragment_order=fragment_order,
        padded_width=width,
        dtype=dtype or hidden.dtype,
        launch=row_launch(width, arch),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 63), (2, 1), (5, 576), (2, 1000), (1, 5120)], ids=str)
def test_sum_and_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    hidden, update = _normal(*shape, scale=3, dtype=dtype), _normal(*shape, seed=2, dtype=dtype)
    norm, width = _norm(shape[1], dtype), padded_width(shape[1])
    expected = hidden + update
    total, normed = _fused(hidden, update, norm, width)
    assert total is hidden
    assert hidden.equal(expected)
    assert_rounds_alike(normed[:, : shape[1]], reference_ops.rms_norm(expected, norm))
    assert normed.shape == (shape[0], width)
    assert normed[:, shape[1] :].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_alone_leaves_hidden_as_it_is(dtype: torch.dtype) -> None:
    hidden, norm = _normal(3, 200, scale=2, dtype=dtype), _norm(200, dtype)
    before = hidden.clone()
    total, normed = _fused(hidden, None, norm, 256)
    assert total is hidden and hidden.equal(before)
    assert_rounds_alike(normed[:, :200], reference_ops.rms_norm(before, norm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_update_is_rounded_once_with_the_sum(dtype: torch.dtype) -> None:
    hidden, update, norm = _normal(4, 320, dtype=dtype), _normal(4, 320, seed=2), _norm(320, dtype)
    expected = (hidden.float() + update).to(dtype)
    assert not expected.equal(hidden + update.to(dtype))
    total, normed = _fused(hidden, update, norm, 320)
    assert total.equal(expected)
    assert_rounds_alike(normed, reference_ops.rms_norm(expected, norm))


@pytest.mark.parametrize("width", [64, 100, 576, 5120])
def test_fragment_order_permutes_what_natural_order_gives(width: int) -> None:
    hidden, norm = _normal(2, width, dtype=torch.bfloat16), _norm(width, torch.bfloat16)
    padded = padded_width(width) + 64
    _, natural = _fused(hidden, None, norm, padded)
    _, ordered = _fused(hidden, None, norm, padded, fragment_order=True)
    assert ordered.equal(to_fragment_order(natural))


def test_a_norm_in_float16_is_that_in_bfloat16_kept_finite() -> None:
    hidden, norm = _normal(3, 100, dtype=torch.bfloat16), _norm(100, torch.bfloat16)
    norm.weight[:2] = torch.tensor([1e6, -1e6])
    for fragment_order in (False, True):
        _, expected = _fused(hidden, None, norm, 128, fragment_order)
        _, normed = _fused(hidden, None, norm, 128, fragment_order, dtype=torch.float16)
        assert normed.equal(expected.float().clamp(-65504, 65504).half())
        assert normed.abs().max() == 65504


def test_rows_at_any_distance() -> None:
    hidden, update, norm = _normal(3, 400), _normal(3, 333, seed=2), _norm(128, torch.float32)
    beside = hidden.clone()
    total, normed = _fused(hidden[:, 64:192], update[:, 100:228], norm, 128)
    assert total.equal(beside[:, 64:192] + update[:, 100:228])
    assert hidden[:, :64].equal(beside[:, :64]) and hidden[:, 192:].equal(beside[:, 192:])
    assert_rounds_alike(normed, reference_ops.rms_norm(total, norm))


def test_eps_holds_tiny_rows() -> None:
    hidden = torch.zeros(2, 64, device=DEVICE)
    hidden[1] = 0.1
    norm = RmsNorm(torch.ones(64, device=DEVICE), 1e-2)
    _, normed = _fused(hidden, None, norm, 64)
    assert_rounds_alike(normed, reference_ops.rms_norm(hidden, norm))
    assert normed[0].eq(0).all()


def test_no_rows() -> None:
    total, normed = _fused(_normal(0, 64), _normal(0, 64), _norm(64, torch.float32), 128)
    assert total.shape == (0, 64) and normed.shape == (0, 128)


@pytest.mark.parametrize("arch", ARCHES)
def test_two_runs_are_equal(arch: int) -> None:
    hidden, norm = _normal(3, 640, dtype=torch.bfloat16), _norm(640, torch.bfloat16)
    first, second = (_fused(hidden.clone(), hidden, norm, 640, arch=arch) for _ in range(2))
    assert first[0].equal(second[0]) and first[1].equal(second[1])


@pytest.mark.skipif(not CONVERTING, reason="a GPU with no conversion to E4M3")
@pytest.mark.parametrize("format", [MXFP8, NVFP4], ids=lambda format: format.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 100, 1000])
def test_the_quantized_copy_is_of_the_rounded_norm(width: int, dtype: torch.dtype, format: Format) -> None:
    hidden, update, norm = _normal(3, width, dtype=dtype), _normal(3, width, seed=2), _norm(width, dtype)
    padded = padded_width(width)
    launch = quantization_launch(padded, CONVERTING[0])
    expected = (hidden.float() + update).to(dtype)
    total, normed, quantized = quantized_residual_rms_norm(
        hidden, update, norm, format=format, padded_width=padded, launch=launch
    )
    assert total is hidden and total.equal(expected)
    want = F.pad(reference_ops.rms_norm(expected, norm), (0, padded - width))
    assert_rounds_alike(normed, want)
    alone = quantize_activations(normed, format, fragment_order=False, launch=launch)
    assert quantized.codes.view(torch.uint8).equal(alone.codes.view(torch.uint8))
    assert quantized.scales().equal(alone.scales())
