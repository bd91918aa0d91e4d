"""Bias, norms, rotation and cache against the reference's functions, in poisoned caches of every form."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from poison import poisoned as poisoned
from rounding import assert_rounds_alike
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.kernels import reference_ops
from nybble.kernels.ops import AttentionShape, RmsNorm, RotaryAngles
from nybble.kernels.triton.qkv import QkvLaunch, qkv_launch, store_qkv

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    AttentionShape(4, 2, 16, 8),
    AttentionShape(3, 3, 8, 8),
    AttentionShape(5, 1, 6, 2),
    AttentionShape(2, 1, 10, 6),
    AttentionShape(9, 3, 64, 64),
    AttentionShape(12, 1, 128, 64),
]
CONVERTING = [arch for arch in ARCHES if arch >= 90]
needs_conversion = pytest.mark.skipif(not CONVERTING, reason="a GPU with no conversion to E4M3")
BLOCK_SIZE, NUM_BLOCKS = 16, 3
SLOTS = [11, 4, 47, 0, 16]


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * math.prod(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@dataclass(frozen=True)
class Inputs:
    qkv: Tensor
    bias: Tensor | None
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    angles: RotaryAngles
    slots: Tensor


def _inputs(
    shape: AttentionShape,
    slots: list[int],
    dtype: torch.dtype = torch.bfloat16,
    qkv_dtype: torch.dtype | None = None,
    has_bias: bool = True,
    has_norms: bool = True,
) -> Inputs:
    tokens, width = len(slots), shape.query_width + 2 * shape.kv_width
    angles = _normal(tokens, shape.rotary_dim // 2, seed=3) * 5
    norms = [RmsNorm(_normal(shape.head_dim, seed=seed, dtype=dtype), 10.0**-seed) for seed in (4, 5)]
    return Inputs(
        qkv=_normal(tokens, width, dtype=qkv_dtype or dtype) * 2,
        bias=_normal(width, seed=2, dtype=dtype) if has_bias else None,
        query_norm=norms[0] if has_norms else None,
        key_norm=norms[1] if has_norms else None,
        angles=RotaryAngles(angles.cos().to(dtype), angles.sin().to(dtype)),
        slots=torch.tensor(slots, dtype=torch.int64, device=DEVICE),
    )


def _reference(inputs: Inputs, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [T, heads, D]."""
    qkv = inputs.qkv.float() if inputs.bias is None else inputs.qkv.float() + inputs.bias.float()
    query, key, value = reference_ops.split_heads(qkv.to(inputs.angles.cos.dtype), shape)
    query = reference_ops.rms_norm(query, inputs.query_norm) if inputs.query_norm else query
    key = reference_ops.rms_norm(key, inputs.key_norm) if inputs.key_norm else key
    return (
        reference_ops.rotate(query, inputs.angles),
        reference_ops.rotate(key, inputs.angles),
        value.contiguous(),
    )


def _empty_cache(shape: AttentionShape, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    page = (NUM_BLOCKS, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
    keys, values = torch.empty(page, device=DEVICE), torch.empty(page, device=DEVICE)
    values = values.mT.contiguous() if transposed else values
    return keys.to(dtype), values.to(dtype)


def _lines(cache: Tensor) -> Tensor:
    """[num_blocks * block_size, num_kv_heads, D], in the order of slots."""
    return cache.transpose(1, 2).flatten(0, 1)


def _run(
    inputs: Inputs,
    shape: AttentionShape,
    keys: Tensor,
    values: Tensor,
    *,
    transposed: bool = False,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
    launch: QkvLaunch | None = None,
) -> Tensor:
    return store_qkv(
        inputs.qkv,
        inputs.bias,
        shape,
        inputs.query_norm,
        inputs.key_norm,
        inputs.angles,
        keys,
        values,
        inputs.slots,
        key_scale=scales[0],
        value_scale=scales[1],
        values_transposed=transposed,
        launch=launch or qkv_launch(len(inputs.qkv), shape, ARCHES[0]),
    )


def _check(
    inputs: Inputs, shape: AttentionShape, transposed: bool = False, launch: QkvLaunch | None = None
) -> None:
    query, key, value = _reference(inputs, shape)
    keys, values = _empty_cache(shape, query.dtype, transposed)
    actual = _run(inputs, shape, keys, values, transposed=transposed, launch=launch)
    assert_rounds_alike(actual, query)
    lines, value_lines = _lines(keys), _lines(values.mT if transposed else values)
    kept = inputs.slots >= 0
    assert_rounds_alike(lines[inputs.slots[kept]], key[kept])
    assert value_lines[inputs.slots[kept]].equal(value[kept])
    others = [slot for slot in range(len(lines)) if slot not in inputs.slots.tolist()]
    assert lines[others].isnan().all() and value_lines[others].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_store_qkv(shape: AttentionShape, transposed: bool, dtype: torch.dtype) -> None:
    _check(_inputs(shape, SLOTS, dtype), shape, transposed)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("qkv_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_that_a_model_may_lack(qkv_dtype: torch.dtype, has_norms: bool, has_bias: bool) -> None:
    shape = AttentionShape(6, 2, 32, 16)
    inputs = _inputs(shape, SLOTS, qkv_dtype=qkv_dtype, has_bias=has_bias, has_norms=has_norms)
    _check(inputs, shape)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 13, 33])
@pytest.mark.parametrize("shape", [AttentionShape(3, 2, 16, 8), AttentionShape(12, 1, 128, 64)], ids=str)
def test_tiles_of_prefill(shape: AttentionShape, tokens: int, transposed: bool) -> None:
    inputs = _inputs(shape, list(range(3, 3 + tokens)))
    _check(inputs, shape, transposed, launch=QkvLaunch(rows=32, num_warps=8))


@pytest.mark.parametrize("transposed", [False, True])
def test_padding_tokens_write_nothing(transposed: bool) -> None:
    """Nor before the cache, where a page lies that slots of -1 and so on would name."""
    shape, slots = AttentionShape(4, 2, 16, 8), [-1, 9, -1, -7, 30]
    inputs = _inputs(shape, slots)
    keys, values = _empty_cache(shape, torch.bfloat16, transposed)
    _run(inputs, shape, keys[1:], values[1:], transposed=transposed)
    assert keys[0].isnan().all() and values[0].isnan().all()
    _check(inputs, shape, transposed)


def test_no_tokens() -> None:
    _check(_inputs(SHAPES[0], []), SHAPES[0])


def test_one_head_of_many_is_read_from_its_own_columns() -> None:
    """96 heads, where a head that is read from another's columns would not be noticed by its shape."""
    shape = AttentionShape(96, 8, 128, 64)
    _check(_inputs(shape, [5]), shape)


@pytest.mark.parametrize("transposed", [False, True])
def test_slices(transposed: bool) -> None:
    """Rows of qkv and of the angles at a distance, and a cache that is one layer of many."""
    shape = AttentionShape(3, 2, 16, 8)
    inputs = _inputs(shape, SLOTS)
    cos, sin = inputs.angles.cos, inputs.angles.sin
    wide = replace(
        inputs,
        qkv=inputs.qkv.repeat(1, 2)[:, : inputs.qkv.shape[1]],
        angles=RotaryAngles(cos.repeat(1, 2)[:, :4], sin.repeat(1, 3)[:, 4:8]),
    )
    layers = [torch.stack((cache,) * 4, 1) for cache in _empty_cache(shape, torch.bfloat16, transposed)]
    keys, values = (layer[:, 1] for layer in layers)
    query = _run(wide, shape, keys, values, transposed=transposed)
    dense = _empty_cache(shape, torch.bfloat16, transposed)
    assert query.equal(_run(inputs, shape, *dense, transposed=transposed))
    for layer, expected in zip(layers, dense, strict=True):
        assert layer[:, 1].view(torch.int16).equal(expected.view(torch.int16))
        assert layer[:, [0, 2, 3]].isnan().all()


def _as_e4m3(x: Tensor, scale: Tensor | None) -> Tensor:
    wide = x.float() if scale is None else x.float() * (1 / scale)
    return wide.clamp(-448, 448).to(FP8)


@needs_conversion
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scales", [None, (0.25, 2.0), (0.037, 0.011)], ids=str)
def test_an_fp8_cache(scales: tuple[float, float] | None, transposed: bool) -> None:
    shape = AttentionShape(4, 2, 32, 16)
    inputs = _inputs(shape, SLOTS)
    tensors = [torch.tensor([scale], device=DEVICE) for scale in scales] if scales else [None, None]
    keys, values = _empty_cache(shape, FP8, transposed)
    launch = qkv_launch(len(SLOTS), shape, CONVERTING[0], cache_dtype=FP8)
    query = _run(
        inputs,
        shape,
        keys,
        values,
        transposed=transposed,
        scales=(tensors[0], tensors[1]),
        launch=launch,
    )
    expected_query, key, value = _reference(inputs, shape)
    assert_rounds_alike(query, expected_query)
    lines, value_lines = _lines(keys.float()), _lines((values.mT if transposed else values).float())
    assert value_lines[SLOTS].equal(_as_e4m3(value, tensors[1]).float())
    differ = lines[SLOTS] != _as_e4m3(key, tensors[0]).float()
    assert differ.float().mean() < 0.02
    others = [slot for slot in range(len(lines)) if slot not in SLOTS]
    assert lines[others].isnan().all() and value_lines[others].isnan().all()


@needs_conversion
def test_an_fp8_cache_saturates() -> None:
    shape = AttentionShape(1, 1, 16, 8)
    inputs = _inputs(shape, [3], has_bias=False)
    inputs.qkv[0, -16:] = torch.tensor([1e4, -1e4, 2.0, 449.0] * 4)
    keys, values = _empty_cache(shape, FP8, False)
    _run(inputs, shape, keys, values, launch=qkv_launch(1, shape, CONVERTING[0], cache_dtype=FP8))
    assert values[0, 0, 3, :4].tolist() == [448, -448, 2, 448]


@pytest.mark.parametrize("transposed", [False, True])
def test_values_that_are_not_finite_are_stored_as_zero(transposed: bool) -> None:
    """Whoever reads the block later reads its unwritten slots too, and 0 * NaN is NaN."""
    shape = AttentionShape(1, 1, 16, 8)
    inputs = _inputs(shape, [3], has_bias=False)
    inputs.qkv[0, -16:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0] * 4)
    keys, values = _empty_cache(shape, torch.bfloat16, transposed)
    _run(inputs, shape, keys, values, transposed=transposed)
    assert _lines(values.mT if transposed else values)[3, 0].tolist() == [0, 0, 0, 3] * 4


@pytest.mark.parametrize("large", ["keys", "values"])
def test_places_beyond_32_bits(large: str) -> None:
    """The last page of a cache of more than 2^31 elements, beside one whose pages are all the same."""
    shape, last = AttentionShape(1, 1, 64, 0), 2**31 // 1024
    inputs = _inputs(shape, [last * 16 + 5], torch.float16, has_bias=False, has_norms=False)
    vast = _vast(last + 1, 1024).view(-1, 1, 16, 64)
    small = torch.empty(1, 1, 16, 64, dtype=torch.float16, device=DEVICE).expand(last + 1, -1, -1, -1)
    keys, values = (vast, small) if large == "keys" else (small, vast)
    _run(inputs, shape, keys, values)
    expected = inputs.qkv[0, 64:128] if large == "keys" else inputs.qkv[0, 128:]
    assert vast[last, 0, 5].equal(expected)


def _vast(rows: int, columns: int) -> Tensor:
    """float16 that the CPU gives memory only where it is written."""
    if DEVICE.type == "cpu":
        return torch.from_numpy(np.empty((rows, columns), np.float16))
    return torch.empty(rows, columns, dtype=torch.float16, device=DEVICE)


@pytest.mark.parametrize("transposed", [False, True])
def test_two_runs_are_equal(transposed: bool) -> None:
    inputs, runs = _inputs(SHAPES[-1], SLOTS), []
    for _ in range(2):
        keys, values = _empty_cache(SHAPES[-1], torch.bfloat16, transposed)
        query = _run(inputs, SHAPES[-1], keys, values, transposed=transposed)
        runs.append([x.view(torch.int16) for x in (query, keys, values)])
    assert all(first.equal(second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("arch", ARCHES)
def test_one_warp_for_few_tokens_and_whole_tiles_for_many(arch: int) -> None:
    glm = AttentionShape(96, 8, 128, 64)
    assert qkv_launch(1, glm, arch) == QkvLaunch(rows=4, num_warps=1)
    assert qkv_launch(16384, glm, arch) == QkvLaunch(rows=32, num_warps=8)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match="no conversion to E4M3"):
        qkv_launch(1, SHAPES[0], 80, cache_dtype=FP8)
    with pytest.raises(ValueError, match="do not halve"):
        qkv_launch(1, AttentionShape(1, 1, 7, 2), 90)
