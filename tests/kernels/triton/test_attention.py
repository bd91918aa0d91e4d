"""Decode attention against float64, in a cache whose unused slots hold NaN keys and large values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_case import BFLOAT16, CACHES, FLOAT32, FP8, AttentionCase, attention_case
from closeness import assert_close
from poison import poisoned as poisoned
from torch import Tensor
from triton_device import ARCHES, DEVICE, interpreted_only

from nybble.kernels.ops import AttentionShape, KVCacheLayer
from nybble.kernels.triton.activation_order import to_fragment_order
from nybble.kernels.triton.attention import DecodeLaunch, decode_launch, paged_decode_attention
from nybble.kernels.triton.launch import recorded_launches

GLM = AttentionShape(num_heads=96, num_kv_heads=8, head_dim=128, rotary_dim=64)
GLM_SHARD = AttentionShape(num_heads=12, num_kv_heads=1, head_dim=128, rotary_dim=64)
readable = [(arch, *cache) for arch in ARCHES for cache in CACHES if cache[1] != FP8 or arch >= 90]
BORDERS = [(1, n) for n in (1, 15, 16, 17, 31, 32, 33, 48, 0, 49)]


def _launch(case: AttentionCase, arch: int, max_query_len: int = 1) -> DecodeLaunch:
    return decode_launch(
        case.shape,
        arch,
        num_sequences=len(case.context_lengths),
        max_query_len=max_query_len,
        max_context=case.max_context,
        block_size=case.block_size,
        cache_dtype=case.cache.keys.dtype,
    )


def _split(
    case: AttentionCase, num_splits: int, arch: int = ARCHES[0], max_query_len: int = 1
) -> DecodeLaunch:
    """As many parts as possible, of one tile and more."""
    return replace(_launch(case, arch, max_query_len), num_splits=num_splits, split_tiles=1)


def _run(
    case: AttentionCase,
    launch: DecodeLaunch,
    *,
    max_query_len: int = 1,
    fragment_order: bool = False,
    output: Tensor | None = None,
) -> Tensor:
    return paged_decode_attention(
        *case.tensors,
        **case.options,
        output=case.empty_output() if output is None else output,
        max_query_len=max_query_len,
        fragment_order=fragment_order,
        launch=launch,
    )


@pytest.mark.parametrize(("arch", "dtype", "cache_dtype", "tolerance"), readable)
def test_contexts_that_end_at_block_borders(
    arch: int, dtype: torch.dtype, cache_dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    case = attention_case(BORDERS, heads=3, dtype=dtype, cache_dtype=cache_dtype)
    assert_close(_run(case, _split(case, 2, arch)), case.expected(), **tolerance)


@pytest.mark.parametrize("num_splits", [1, 2, 4, 16, 128])
def test_any_number_of_parts_most_of_them_empty(num_splits: int) -> None:
    case = attention_case([(1, 100), (1, 1), (1, 0), (1, 64)], heads=2)
    assert_close(_run(case, _split(case, num_splits)), case.expected(), **FLOAT32)


def test_parts_have_at_least_so_many_tiles() -> None:
    """Of 9 tiles the second of two parts has 4, of 3 tiles it has none: what it would write is not read."""
    case = attention_case([(1, 140), (1, 47)])
    launch = replace(_split(case, 8), split_tiles=5)
    assert_close(_run(case, launch), case.expected(), **FLOAT32)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 1), (9, 3), (4, 4), (1, 1), (20, 1)])
def test_head_geometry(heads: int, kv_heads: int, head_dim: int) -> None:
    case = attention_case([(1, 37), (1, 16)], heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    assert_close(_run(case, _split(case, 2)), case.expected(), **FLOAT32)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_tiles_that_are_parts_of_a_block(block_size: int) -> None:
    case = attention_case([(1, 200), (1, 129), (1, 64)], block_size=block_size, dtype=torch.bfloat16)
    assert_close(_run(case, _split(case, 2)), case.expected(), **BFLOAT16)


@pytest.mark.parametrize(
    ("arch", "heads", "max_query_len", "num_splits"),
    [
        *((arch, 12, max_query_len, 1) for arch in ARCHES for max_query_len in (4, 8)),  # 64 and 128 rows
        (ARCHES[0], 12, 2, 1),
        (ARCHES[0], 2, 4, 4),
        (ARCHES[0], 3, 8, 2),
    ],
)
def test_several_query_tokens_see_one_more_key_each(
    arch: int, heads: int, max_query_len: int, num_splits: int
) -> None:
    """Sequences have from no token to as many as allowed, contexts from those tokens only to four blocks."""
    n = max_query_len
    spans = [(n, n), (n, 64), (1, 33), (n, 16 + n // 2), (0, 20), (n - 1, 49), (1, 0)]
    case = attention_case(spans, heads=heads, dtype=torch.bfloat16)
    launch = _split(case, num_splits, arch, max_query_len)
    assert_close(_run(case, launch, max_query_len=n), case.expected(), **BFLOAT16)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_padding_rows_of_a_captured_batch_are_zeros(num_splits: int) -> None:
    """They have a query token and no context, and leave the others alone."""
    padded = attention_case([(1, 40), (1, 0), (1, 0), (1, 17), (1, 0)])
    output = _run(padded, _split(padded, num_splits))
    assert not output[[1, 2, 4]].any()
    assert_close(output, padded.expected(), **FLOAT32)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0])
def test_flat_and_sharp_weights(sharpness: float) -> None:
    case = attention_case([(1, 500)], cache_dtype=torch.bfloat16, sharpness=sharpness, head_dim=64)
    case = replace(case, query=case.query.bfloat16())
    assert_close(_run(case, _split(case, 4)), case.expected(), **BFLOAT16)


def test_scores_far_from_zero_neither_overflow_nor_vanish() -> None:
    case = attention_case([(1, 40)], sharpness=1.0)
    far = replace(case, query=case.query * 1e4)
    assert_close(_run(far, _split(far, 4)), far.expected(), max_error=1e-2, rms_error=1e-3)


@pytest.mark.parametrize("fragment_order", [False, True])
@pytest.mark.parametrize(
    ("num_splits", "head_dim", "heads"), [(1, 64, 3), (4, 128, 3), (1, 16, 12), (4, 16, 12)]
)
def test_columns_in_fragment_order(num_splits: int, head_dim: int, heads: int, fragment_order: bool) -> None:
    case = attention_case([(1, 37), (1, 5)], heads=heads, head_dim=head_dim, dtype=torch.bfloat16)
    output = _run(case, _split(case, num_splits), fragment_order=fragment_order)
    natural = _run(case, _split(case, num_splits))
    assert torch.equal(output, to_fragment_order(natural) if fragment_order else natural)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_slices_of_larger_tensors(num_splits: int) -> None:
    """Queries inside q, k and v; one layer of a cache of two; a wide table; spare columns of output."""
    case = attention_case([(1, 37), (2, 20), (1, 16)], heads=6, kv_heads=2)
    wide_query = torch.full((4, 10, 16), torch.nan, device=DEVICE)
    wide_query[:, :6] = case.query
    wide_table = torch.full((3, 9), 1 << 20, dtype=torch.int32, device=DEVICE)
    wide_table[:, : case.block_tables.shape[1]] = case.block_tables
    keys, values = (
        torch.stack((torch.full_like(x, torch.nan), x), 1)[:, 1] for x in (case.cache.keys, case.cache.values)
    )
    output = torch.full((4, 128), 5.0, device=DEVICE)
    sliced = replace(
        case,
        query=wide_query[:, :6],
        cache=KVCacheLayer(keys, values),
        block_tables=wide_table[:, : case.block_tables.shape[1]],
    )
    _run(sliced, _split(sliced, num_splits, max_query_len=2), max_query_len=2, output=output[:, 16:112])
    assert_close(output[:, 16:112], case.expected(), **FLOAT32)
    assert (output[:, :16] == 5).all() and (output[:, 112:] == 5).all()


def test_some_sequences_of_a_batch() -> None:
    case = attention_case([(1, 37), (2, 20), (1, 16), (1, 33)])
    part = replace(
        case,
        block_tables=case.block_tables[1:3],
        context_lengths=case.context_lengths[1:3],
        query_starts=case.query_starts[1:4],
    )
    output = _run(part, _split(part, 2, max_query_len=2), max_query_len=2)
    assert output[[0, 4]].isnan().all()
    assert_close(output[1:4], case.expected()[1:4], **FLOAT32)


def test_two_runs_are_equal_bit_for_bit() -> None:
    case = attention_case([(1, 150), (1, 37)], heads=3, dtype=torch.bfloat16)
    launch = _split(case, 4)
    assert torch.equal(_run(case, launch), _run(case, launch))


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    case = attention_case([(1, 150), (1, 37), (1, 64)], heads=3, dtype=torch.bfloat16)
    launch = _split(case, 4)
    alone = replace(
        case,
        block_tables=case.block_tables[1:2],
        context_lengths=case.context_lengths[1:2],
        query_starts=case.query_starts[1:3],
    )
    assert torch.equal(_run(case, launch)[1], _run(alone, launch)[1])


# Long contexts.


def test_the_longest_context() -> None:
    """202,752 tokens in blocks of 1,024, of which there are five: the table repeats them."""
    context, size = 202_752, 1024
    generator = torch.Generator().manual_seed(3)
    case = attention_case([(1, 5 * size)], heads=4, block_size=size, sharpness=0.5)
    picks = torch.randint(5, (context // size,), generator=generator)
    keys, values = (x.unflatten(0, (5, size))[picks].flatten(0, 1) for x in case.contexts[0])
    long = replace(
        case,
        block_tables=case.block_tables[:, picks],
        context_lengths=torch.tensor([context], dtype=torch.int32, device=DEVICE),
        contexts=[(keys, values)],
    )
    launch = replace(_split(long, 8), tile=size if DEVICE.type == "cpu" else 16)
    assert_close(_run(long, launch), long.expected(), max_error=2e-4, rms_error=2e-5)


@interpreted_only
def test_blocks_further_than_32_bits_can_count() -> None:
    """Blocks 2^30 elements apart, in memory of which nothing else is touched."""
    case = attention_case([(1, 45)], cache_dtype=FP8)
    distance = 1 << 30
    far = []
    for blocks in (case.cache.keys, case.cache.values):
        storage = torch.from_numpy(np.empty(4 * distance, np.uint8)).view(FP8)
        places = storage.as_strided(blocks.shape, (distance, *blocks.stride()[1:]))
        places.copy_(blocks)
        far.append(places)
    case = replace(case, cache=KVCacheLayer(*far))
    tolerance = {"max_error": 3e-3, "rms_error": 3e-4}
    assert_close(_run(case, _split(case, 2, arch=90)), case.expected(), **tolerance)


# The launch.


def _glm_launch(shape: AttentionShape, sequences: int, arch: int = 90, **changes: int) -> DecodeLaunch:
    sizes = {"max_query_len": 1, "max_context": 202_752, "block_size": 64} | changes
    return decode_launch(shape, arch, num_sequences=sequences, cache_dtype=torch.bfloat16, **sizes)


@pytest.mark.parametrize(
    ("shape", "sequences", "max_context", "num_splits", "split_tokens"),
    [
        (GLM_SHARD, 1, 202_752, 128, 128),
        (GLM_SHARD, 8, 202_752, 32, 128),
        (GLM, 1, 202_752, 32, 128),
        (GLM, 8, 202_752, 4, 128),
        (GLM, 32, 202_752, 4, 1024),
        (GLM, 256, 202_752, 4, 1024),
        (GLM, 1, 1024, 8, 128),
        (GLM, 256, 1024, 1, 1024),
        (GLM, 1, 64, 1, 128),
    ],
)
def test_contexts_are_divided_to_fill_the_gpu(
    shape: AttentionShape, sequences: int, max_context: int, num_splits: int, split_tokens: int
) -> None:
    launch = _glm_launch(shape, sequences, max_context=max_context)
    assert (launch.num_splits, launch.split_tiles * launch.tile) == (num_splits, split_tokens)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize(("max_query_len", "rows"), [(1, 16), (2, 32), (4, 64), (8, 128)])
def test_rows_hold_all_query_tokens(arch: int, max_query_len: int, rows: int) -> None:
    launch = _glm_launch(GLM, 4, arch, max_query_len=max_query_len)
    assert launch.rows == rows
    assert launch.tile <= 64 and launch.split_tiles * launch.tile >= 128


def test_more_query_tokens_are_not_for_decode() -> None:
    with pytest.raises(ValueError, match="more than 128 rows"):
        _glm_launch(GLM, 1, max_query_len=11)


def test_caches_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size 48"):
        _glm_launch(GLM, 1, block_size=48)
    with pytest.raises(ValueError, match="head_dim 96"):
        _glm_launch(replace(GLM, head_dim=96), 1)
    case = attention_case([(1, 5)], cache_dtype=FP8)
    with pytest.raises(ValueError, match="sm_80 cannot read an FP8 cache"):
        _launch(case, 80)


@pytest.mark.parametrize(("max_context", "num_kernels"), [(64, 1), (202_752, 2)])
def test_launches_are_recorded_without_data(max_context: int, num_kernels: int) -> None:
    case = attention_case([(1, 5), (1, 9)])
    meta = {name: x.to("meta") for name, x in vars(case).items() if isinstance(x, Tensor)}
    cache = KVCacheLayer(case.cache.keys.to("meta"), case.cache.values.to("meta"))
    with recorded_launches() as launches:
        _run(replace(case, cache=cache, **meta), _glm_launch(GLM_SHARD, 2, max_context=max_context))
    assert len(launches) == num_kernels
