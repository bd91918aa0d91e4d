"""Against the reference with the same weights, in caches of every dtype that hold NaN at first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_close
from cpu_weights import generator_of
from poison import poisoned as poisoned
from torch import Tensor

from nybble.kernels.cpu.attention_input import attention_input
from nybble.kernels.cpu.cpu_matrix import CpuMatrix, FloatForm, dequantize, prepare
from nybble.kernels.cpu.kv_cache_layout import new_kv_cache, to_slot_order
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.ops import AttentionShape, AttentionWeights, KVCacheLayer, RmsNorm, RotaryAngles
from nybble.kernels.reference_ops import ReferenceOps, to_fp8

FP8 = torch.float8_e4m3fn
HIDDEN, BLOCK_SIZE, NUM_BLOCKS = 96, 4, 9
SLOTS = [11, 4, 35, 0, 16, 17]
SHAPES = [
    AttentionShape(4, 2, 16, 8),
    AttentionShape(3, 3, 8, 8),
    AttentionShape(5, 1, 6, 2),
    AttentionShape(2, 1, 10, 0),
    AttentionShape(9, 3, 64, 64),
]
EXACT = {"max_error": 2e-5, "rms_error": 2e-6}


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator_of(seed, *shape))


def _weights(
    shape: AttentionShape, *, has_bias: bool = True, has_norms: bool = True, form: FloatForm = "bf16"
) -> AttentionWeights[CpuMatrix]:
    rows = shape.query_width + 2 * shape.kv_width
    over_heads = [RmsNorm(_normal(shape.head_dim, seed=seed), 10.0**-seed) for seed in (4, 5)]
    norms = over_heads if has_norms else [None, None]
    return AttentionWeights(
        shape=shape,
        norm=RmsNorm(_normal(HIDDEN, seed=2), 1e-5),
        qkv=prepare(_normal(rows, HIDDEN) / HIDDEN**0.5, form),
        qkv_bias=_normal(rows, seed=3) if has_bias else None,
        query_norm=norms[0],
        key_norm=norms[1],
        output=prepare(_normal(HIDDEN, shape.query_width), form),
    )


def _as_reference(weights: AttentionWeights[CpuMatrix]) -> AttentionWeights[Tensor]:
    return AttentionWeights(
        weights.shape,
        weights.norm,
        dequantize(weights.qkv),
        weights.qkv_bias,
        weights.query_norm,
        weights.key_norm,
        dequantize(weights.output),
    )


def _angles(tokens: int, shape: AttentionShape) -> RotaryAngles:
    angles = _normal(tokens, shape.rotary_dim // 2, seed=7) * 5
    return RotaryAngles(angles.cos(), angles.sin())


def _empty_cache(shape: AttentionShape, dtype: torch.dtype = torch.float32) -> KVCacheLayer:
    cache = new_kv_cache(NUM_BLOCKS, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim, dtype)
    for stored in (cache.keys, cache.values):
        stored.copy_(torch.full(stored.shape, torch.nan).to(dtype))
    return cache


def _lines(stored: Tensor) -> Tensor:
    return stored.flatten(0, 1)


def _run(
    pool: Pool,
    weights: AttentionWeights[CpuMatrix],
    cache: KVCacheLayer,
    slots: list[int],
    hidden: Tensor | None = None,
    update: Tensor | None = None,
    angles: RotaryAngles | None = None,
) -> tuple[Tensor, Tensor]:
    tokens = len(slots)
    hidden = _normal(tokens, HIDDEN) if hidden is None else hidden
    angles = angles or _angles(tokens, weights.shape)
    return attention_input(pool, hidden, update, weights, angles, cache, torch.tensor(slots))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(pool: Pool, shape: AttentionShape, has_norms: bool, has_bias: bool) -> None:
    weights = _weights(shape, has_bias=has_bias, has_norms=has_norms)
    hidden, update = _normal(6, HIDDEN), _normal(6, HIDDEN, seed=1)
    expected_cache, cache = to_slot_order(_empty_cache(shape)), _empty_cache(shape)
    expected = ReferenceOps(torch.float32).attention_input(
        hidden, update, _as_reference(weights), _angles(6, shape), expected_cache, torch.tensor(SLOTS)
    )
    added, query = _run(pool, weights, cache, SLOTS, hidden.clone(), update)
    assert torch.equal(added, expected[0])
    assert_close(query, expected[1], **EXACT)
    written, others = to_slot_order(cache), [slot for slot in range(36) if slot not in SLOTS]
    for stored, wanted in ((written.keys, expected_cache.keys), (written.values, expected_cache.values)):
        assert_close(_lines(stored)[SLOTS], _lines(wanted)[SLOTS], **EXACT)
        assert _lines(stored)[others].isnan().all()


def test_int8_is_within_its_bound(pool: Pool) -> None:
    shape = SHAPES[4]
    weights = _weights(shape, form="int8", has_norms=False)
    cache = _empty_cache(shape)
    hidden = _normal(6, HIDDEN)
    _, query = _run(pool, weights, cache, SLOTS, hidden.clone())
    _, expected = ReferenceOps(torch.float32).attention_input(
        hidden,
        None,
        _as_reference(weights),
        _angles(6, shape),
        to_slot_order(_empty_cache(shape)),
        torch.tensor(SLOTS),
    )
    assert_close(query, expected, max_error=4e-2, rms_error=8e-3)


@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
def test_any_number_of_tokens_and_each_alone(pool: Pool, tokens: int) -> None:
    """The same bits."""
    shape = SHAPES[0]
    weights, slots = _weights(shape, form="int8"), list(range(tokens))
    hidden, angles, cache = _normal(tokens, HIDDEN), _angles(tokens, shape), _empty_cache(shape)
    _, query = _run(pool, weights, cache, slots, hidden.clone(), angles=angles)
    for token in {0, tokens // 2, tokens - 1}:
        alone, row = _empty_cache(shape), slice(token, token + 1)
        own = RotaryAngles(angles.cos[row], angles.sin[row])
        _, one = _run(pool, weights, alone, [token], hidden[row].clone(), angles=own)
        assert torch.equal(one, query[row])
        for stored, together in (
            (to_slot_order(alone).keys, to_slot_order(cache).keys),
            (to_slot_order(alone).values, to_slot_order(cache).values),
        ):
            assert torch.equal(_lines(stored)[token], _lines(together)[token])


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_caches_round_to_the_nearest(pool: Pool, dtype: torch.dtype) -> None:
    """As torch does: every number from subnormal to too large, ties, infinities and NaN."""
    shape = AttentionShape(1, 1, 64, 0)
    weights = _weights(shape, has_norms=False)
    assert weights.qkv_bias is not None
    special = [0.0, -0.0, 448.0, 464.0, 1e9, -500.0, torch.inf, -torch.inf, torch.nan, 2**-10, 3 * 2**-10]
    ties = torch.tensor(
        [*special, 2**-9, 1.0625, 1.1875, 17.0, 19.0, 2**-7 + 2**-10, 1 + 2**-8, 1 + 3 * 2**-8]
    )
    spread = _normal(192 - len(ties), seed=9) * 10 ** (_normal(192 - len(ties), seed=10) * 2)
    weights.qkv_bias[:] = torch.cat((ties, spread))[torch.randperm(192, generator=generator_of(1))]
    cache = _empty_cache(shape, dtype)
    scales = torch.tensor([0.75]), torch.tensor([3.0])
    if dtype == FP8:
        cache = replace(cache, key_scale=scales[0], value_scale=scales[1])
    _run(pool, weights, cache, [5], hidden=torch.zeros(1, HIDDEN))
    key, value = weights.qkv_bias[64:128], weights.qkv_bias[128:]
    lines = to_slot_order(cache)
    for stored, number, scale in zip((lines.keys, lines.values), (key, value), scales, strict=True):
        expected = to_fp8(number, scale) if dtype == FP8 else number.to(dtype)
        assert torch.equal(_lines(stored)[5, 0].float().nan_to_num(9e9), expected.float().nan_to_num(9e9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [0, 36]}, "slots are 0 to 36, but the cache has 36"),
        ({"slots": [-1, 5]}, "slots are -1 to 5"),
        ({"hidden": torch.zeros(2, HIDDEN, dtype=torch.bfloat16)}, r"hidden is torch\.bfloat16"),
        ({"hidden": torch.zeros(2, 50)}, r"hidden is .*\[2, 50\]"),
        ({"update": torch.zeros(3, HIDDEN)}, r"update is .*\[3, 96\]"),
        ({"angles": RotaryAngles(torch.zeros(2, 8), torch.zeros(2, 4))}, r"angles\.cos is .*\[2, 8\]"),
        ({"cache": new_kv_cache(9, 4, 2, 8, torch.float32)}, "the cache has 2 heads of 8, expected 2 of 16"),
        (
            {"weights": replace(_weights(SHAPES[0]), shape=AttentionShape(5, 2, 16, 8))},
            "qkv has 128 rows, expected 144",
        ),
        (
            {"weights": replace(_weights(SHAPES[0]), shape=AttentionShape(4, 2, 16, 18))},
            "rotary_dim is 18, expected an even number up to 16",
        ),
        ({"weights": replace(_weights(SHAPES[0]), qkv_bias=torch.zeros(127))}, "qkv_bias is"),
        (
            {"weights": replace(_weights(SHAPES[0]), key_norm=RmsNorm(torch.ones(8), 0))},
            r"key_norm\.weight is",
        ),
    ],
)
def test_what_does_not_fit_is_named(pool: Pool, change: dict[str, Any], message: str) -> None:
    arguments = {"weights": _weights(SHAPES[0]), "cache": _empty_cache(SHAPES[0]), "slots": [1, 2]} | change
    with pytest.raises(ValueError, match=message):
        _run(pool, **arguments)
