"""Every layout against the packages that write it, and what a damaged one says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import Checkpoint, Span
from nybble.engine.checkpoint.layouts import (
    COMPRESSED_MXFP4,
    COMPRESSED_NVFP4,
    FLOATS,
    FP8_PER_CHANNEL,
    MODELOPT_NVFP4,
    QUARK_MXFP4,
    Layout,
    check_matrix,
    find_layout,
    stored_tensors,
)
from nybble.engine.checkpoint.matrix_reader import Part, is_uniform, read_matrix, read_stack
from nybble.engine.errors import CheckpointError
from nybble.kernels import fp8, mxfp4, nvfp4
from nybble.kernels.quantized_tensor import MXFP4, NVFP4_DIVIDED, QuantizedTensor

ROWS, COLUMNS = 48, 96
NVFP4_ARGS = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
MXFP4_ARGS = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)


def _weight(seed: int) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05


def _checkpoint(directory: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint.open(directory)


def _compressed_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """As llm-compressor makes it: scales by its rule, codes by compressed-tensors itself."""
    global_scale = (448.0 * 6.0 / weight.abs().amax()).reshape(1)
    blocks = weight.unflatten(-1, (-1, 16)).abs().amax(dim=-1)
    scale = (global_scale * blocks / 6.0).to(torch.float8_e4m3fn).float()
    scheme = QuantizationScheme(targets=["Linear"], weights=NVFP4_ARGS)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    return dict(NVFP4PackedCompressor.compress(state, scheme))


def _compressed_mxfp4(weight: Tensor) -> dict[str, Tensor]:
    scale = mxfp4.quantize(weight).scales()
    scheme = QuantizationScheme(targets=["Linear"], weights=MXFP4_ARGS)
    return dict(MXFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale}, scheme))


def _under(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}


@pytest.mark.parametrize("seed", range(5))
def test_compressed_nvfp4_is_decoded_bit_for_bit(tmp_path: Path, seed: int) -> None:
    stored = _compressed_nvfp4(_weight(seed))
    checkpoint = _checkpoint(tmp_path, _under("m", stored))
    assert find_layout("m", checkpoint.entries) is COMPRESSED_NVFP4
    matrix = read_matrix(checkpoint, "m")
    assert isinstance(matrix, QuantizedTensor) and matrix.format is NVFP4_DIVIDED
    expected = dequantize(
        unpack_fp4_from_uint8(stored["weight_packed"], ROWS, COLUMNS, torch.float32),
        scale=stored["weight_scale"].float(),
        args=NVFP4_ARGS,
        dtype=torch.float32,
        global_scale=stored["weight_global_scale"],
    )
    assert torch.equal(matrix.dequantize(), expected)


@pytest.mark.parametrize("seed", range(5))
def test_compressed_mxfp4_is_decoded_bit_for_bit(tmp_path: Path, seed: int) -> None:
    stored = _compressed_mxfp4(_weight(seed))
    checkpoint = _checkpoint(tmp_path, _under("m", stored))
    assert find_layout("m", checkpoint.entries) is COMPRESSED_MXFP4
    matrix = read_matrix(checkpoint, "m")
    assert isinstance(matrix, QuantizedTensor) and matrix.format is MXFP4
    expected = dequantize(
        unpack_fp4_from_uint8(stored["weight_packed"], ROWS, COLUMNS, torch.float32),
        scale=decompress_mx_scale(stored["weight_scale"]).float(),
        args=MXFP4_ARGS,
        dtype=torch.float32,
    )
    assert torch.equal(matrix.dequantize(), expected)


@pytest.mark.parametrize("seed", range(5))
def test_our_codes_are_those_of_compressed_tensors(seed: int) -> None:
    """Given the same scales, both pick the same elements (but for the sign of an exact zero)."""
    weight = _weight(seed)
    ours, theirs = mxfp4.quantize(weight), _compressed_mxfp4(weight)
    assert torch.equal(ours.codes, theirs["weight_packed"])
    assert ours.block_scales is not None
    assert torch.equal(ours.block_scales.view(torch.uint8), theirs["weight_scale"])


LAYOUTS: list[tuple[Layout, QuantizedTensor]] = [
    (MODELOPT_NVFP4, nvfp4.quantize(_weight(1))),
    (COMPRESSED_MXFP4, mxfp4.quantize(_weight(1))),
    (QUARK_MXFP4, mxfp4.quantize(_weight(1))),
    (FP8_PER_CHANNEL, fp8.quantize(_weight(1))),
]


@pytest.mark.parametrize(("layout", "weight"), LAYOUTS, ids=[layout.name for layout, _ in LAYOUTS])
def test_written_and_read_again(tmp_path: Path, layout: Layout, weight: QuantizedTensor) -> None:
    tensors = stored_tensors("m", weight, layout)
    checkpoint = _checkpoint(tmp_path, tensors)
    assert find_layout("m", checkpoint.entries) is layout
    assert set(check_matrix("m", (ROWS, COLUMNS), checkpoint.entries)) == set(tensors)
    matrix = read_matrix(checkpoint, "m")
    assert isinstance(matrix, QuantizedTensor)
    assert torch.equal(matrix.dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_floats_come_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = _checkpoint(tmp_path, {"m.weight": _weight(2).to(dtype)})
    assert find_layout("m", checkpoint.entries) is FLOATS
    matrix = read_matrix(checkpoint, "m")
    assert isinstance(matrix, Tensor) and torch.equal(matrix, _weight(2).to(dtype))


@pytest.mark.parametrize("scale_shape", [(ROWS, 1), (ROWS,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_scales_in_either_shape_and_dtype(
    tmp_path: Path, scale_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scales = torch.rand(ROWS).add(0.5).to(dtype)
    codes = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    checkpoint = _checkpoint(tmp_path, {"m.weight": codes, "m.weight_scale": scales.reshape(scale_shape)})
    assert set(check_matrix("m", (ROWS, COLUMNS), checkpoint.entries)) == {"m.weight", "m.weight_scale"}
    matrix = read_matrix(checkpoint, "m")
    assert isinstance(matrix, QuantizedTensor)
    assert torch.equal(matrix.dequantize(), codes.float() * scales.float().unsqueeze(1))


# Spans.


def _fp8(scale_shape: tuple[int, ...]) -> dict[str, Tensor]:
    scales = torch.rand(ROWS, generator=torch.Generator().manual_seed(4)).add(0.5)
    return {"weight": _weight(4).to(torch.float8_e4m3fn), "weight_scale": scales.reshape(scale_shape)}


STORED: dict[str, dict[str, Tensor]] = {
    "BF16": {"m.weight": _weight(4).bfloat16()},
    "ModelOpt NVFP4": stored_tensors("m", nvfp4.quantize(_weight(4)), MODELOPT_NVFP4),
    "compressed-tensors NVFP4": _under("m", _compressed_nvfp4(_weight(4))),
    "compressed-tensors MXFP4": _under("m", _compressed_mxfp4(_weight(4))),
    "Quark MXFP4": stored_tensors("m", mxfp4.quantize(_weight(4)), QUARK_MXFP4),
    "FP8, scales [N, 1]": _under("m", _fp8((ROWS, 1))),
    "FP8, scales [N]": _under("m", _fp8((ROWS,))),
}
# Columns in whole blocks of 32.
SPANS = [
    *(Span(0, *rows) for rows in ((0, 1), (0, 24), (24, 48), (17, 18), (5, 41), (0, ROWS))),
    *(Span(1, *columns) for columns in ((0, 32), (32, 64), (64, 96), (32, 96), (0, COLUMNS))),
]


def _parts(matrix: Tensor | QuantizedTensor) -> list[Tensor]:
    """Codes and scales, as numbers that compare."""
    if isinstance(matrix, Tensor):
        return [matrix]
    parts = (matrix.codes, matrix.block_scales, matrix.global_scales)
    return [part.float() for part in parts if part is not None]


def _floats(matrix: Tensor | QuantizedTensor) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else matrix.dequantize()


@pytest.mark.parametrize("name", STORED)
def test_a_span_of_a_matrix_is_that_of_its_weights(name: str, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, STORED[name])
    whole = _floats(read_matrix(checkpoint, "m"))
    for span in SPANS:
        actual = _floats(read_matrix(checkpoint, "m", span))
        assert torch.equal(actual, whole.narrow(span.axis, span.start, span.stop - span.start)), span


@pytest.mark.parametrize("name", STORED)
def test_a_span_is_codes_and_scales_as_they_are_stored(name: str, tmp_path: Path) -> None:
    """Dimensions of each part shrink as the weights' do; only one scale for all columns stays."""
    checkpoint = _checkpoint(tmp_path, STORED[name])
    whole = read_matrix(checkpoint, "m")
    for span in SPANS:
        actual = read_matrix(checkpoint, "m", span)
        assert type(actual) is type(whole)
        for part, full in zip(_parts(actual), _parts(whole), strict=True):
            if span.axis == 0:
                assert torch.equal(part, full[span.start : span.stop])
            elif full.ndim == 2:
                items = COLUMNS // full.shape[1]
                assert torch.equal(part, full[:, span.start // items : span.stop // items])
            else:
                assert torch.equal(part, full)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("axis", [0, 1])
def test_spans_that_tile_a_matrix_are_all_of_it(name: str, axis: int, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, STORED[name])
    third = (ROWS, COLUMNS)[axis] // 3
    spans = [Span(axis, n * third, (n + 1) * third) for n in range(3)]
    parts = [_floats(read_matrix(checkpoint, "m", span)) for span in spans]
    assert torch.equal(torch.cat(parts, dim=axis), _floats(read_matrix(checkpoint, "m")))


def test_a_divisor_taken_for_a_factor_is_caught(tmp_path: Path) -> None:
    """A compressed-tensors matrix under ModelOpt's names: the scales mean weights of 1e9."""
    stored = _compressed_nvfp4(_weight(3))
    renamed = {
        "m.weight": stored["weight_packed"],
        "m.weight_scale": stored["weight_scale"],
        "m.weight_scale_2": stored["weight_global_scale"],
    }
    checkpoint = _checkpoint(tmp_path, renamed)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'm.weight': .*divisor"):
        read_matrix(checkpoint, "m")


def test_a_factor_taken_for_a_divisor_is_caught(tmp_path: Path) -> None:
    tensors = stored_tensors("m", nvfp4.quantize(_weight(3)), MODELOPT_NVFP4)
    renamed = {
        "m.weight_packed": tensors["m.weight"],
        "m.weight_scale": tensors["m.weight_scale"],
        "m.weight_global_scale": tensors["m.weight_scale_2"],
    }
    with pytest.raises(CheckpointError, match=r"tensor 'm.weight_packed': .*divisor"):
        read_matrix(_checkpoint(tmp_path, renamed), "m")


@pytest.mark.parametrize(("layout", "weight"), LAYOUTS, ids=[layout.name for layout, _ in LAYOUTS])
def test_nan_scales_are_named(tmp_path: Path, layout: Layout, weight: QuantizedTensor) -> None:
    tensors = stored_tensors("m", weight, layout)
    name, scale = list(tensors.items())[1]
    if scale.dtype == torch.float32:
        scale.view(-1)[7] = torch.nan
    else:  # E4M3 has one NaN of each sign, E8M0 one
        scale.view(torch.uint8).view(-1)[7] = 0x7F if scale.dtype == torch.float8_e4m3fn else 0xFF
    checkpoint = _checkpoint(tmp_path, tensors | {name: scale})
    with pytest.raises(CheckpointError, match=rf"tensor 'm.{layout.codes}': its scales hold NaN"):
        read_matrix(checkpoint, "m")


def test_all_zero_matrices_are_accepted(tmp_path: Path) -> None:
    for layout, quantize in ((MODELOPT_NVFP4, nvfp4.quantize), (QUARK_MXFP4, mxfp4.quantize)):
        directory = tmp_path / layout.name
        directory.mkdir()
        zeros = quantize(torch.zeros(ROWS, COLUMNS))
        matrix = read_matrix(_checkpoint(directory, stored_tensors("m", zeros, layout)), "m")
        assert isinstance(matrix, QuantizedTensor) and not matrix.dequantize().any()


def _modules(directory: Path, weights: dict[str, QuantizedTensor], layout: Layout) -> Checkpoint:
    tensors = {}
    for name, weight in weights.items():
        tensors |= stored_tensors(name, weight, layout)
    return _checkpoint(directory, tensors)


@pytest.mark.parametrize(
    ("layout", "quantize"), [(MODELOPT_NVFP4, nvfp4), (QUARK_MXFP4, mxfp4), (FP8_PER_CHANNEL, fp8)]
)
def test_a_stack_is_made_of_its_parts(tmp_path: Path, layout: Layout, quantize: ModuleType) -> None:
    """Three matrices of two parts each, of which spans are read; each part keeps its own global scale."""
    names = [[f"{expert}.{part}" for part in ("gate", "up")] for expert in range(3)]
    scales = {name: 2.0**number for number, name in enumerate(n for pair in names for n in pair)}
    weights = {name: quantize.quantize(_weight(3) * scale) for name, scale in scales.items()}
    checkpoint = _modules(tmp_path, weights, layout)
    gate, up = Span(0, 16, 48), Span(0, 0, 16)
    grid = [[Part(first, gate), Part(second, up)] for first, second in names]
    assert is_uniform(checkpoint, grid)
    stack = read_stack(checkpoint, grid)
    assert isinstance(stack, QuantizedTensor)
    for matrix, (first, second) in enumerate(names):
        expected = (weights[first].dequantize()[16:48], weights[second].dequantize()[:16])
        assert torch.equal(stack[matrix].dequantize(), torch.cat(expected))


def test_a_bad_scale_within_a_stack_is_named(tmp_path: Path) -> None:
    weights = {name: nvfp4.quantize(_weight(4)) for name in ("a", "b", "c", "d")}
    assert weights["c"].block_scales is not None
    weights["c"].block_scales.view(torch.uint8)[-1, -1] = 0x7F  # NaN
    checkpoint = _modules(tmp_path, weights, MODELOPT_NVFP4)
    with pytest.raises(CheckpointError, match=r"tensor 'c\.weight': its scales hold NaN"):
        read_stack(checkpoint, [[Part("a"), Part("b")], [Part("c"), Part("d")]])


def test_what_is_stored_differently_is_not_uniform(tmp_path: Path) -> None:
    tensors = stored_tensors("a", nvfp4.quantize(_weight(5)), MODELOPT_NVFP4)
    tensors |= stored_tensors("b", mxfp4.quantize(_weight(5)), QUARK_MXFP4)
    tensors |= {"c.weight": _weight(5).bfloat16(), "d.weight": _weight(5)}
    checkpoint = _checkpoint(tmp_path, tensors)
    for first, second in ("ab", "ac", "cd"):
        assert not is_uniform(checkpoint, [[Part(first), Part(second)]])
        assert is_uniform(checkpoint, [[Part(first)], [Part(first)]])
