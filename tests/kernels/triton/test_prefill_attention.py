"""Prefill attention against float64, in a cache whose unused slots hold NaN keys and large values."""

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
from nybble.kernels.triton.attention import decode_launch, paged_decode_attention
from nybble.kernels.triton.launch import recorded_launches
from nybble.kernels.triton.prefill_attention import PrefillLaunch, paged_prefill_attention, prefill_launch

MIXED = [(1, 33), (20, 20), (1, 1), (7, 50), (1, 0), (0, 9), (33, 48), (1, 16), (16, 17)]
readable = [(arch, *cache) for arch in ARCHES for cache in CACHES if cache[1] != FP8 or arch >= 90]


def _launch(case: AttentionCase, arch: int = ARCHES[0]) -> PrefillLaunch:
    return prefill_launch(case.shape, arch, block_size=case.block_size, cache_dtype=case.cache.keys.dtype)


def _run(
    case: AttentionCase,
    launch: PrefillLaunch,
    *,
    fragment_order: bool = False,
    output: Tensor | None = None,
) -> Tensor:
    return paged_prefill_attention(
        *case.tensors,
        **case.options,
        output=case.empty_output() if output is None else output,
        fragment_order=fragment_order,
        launch=launch,
    )


@pytest.mark.parametrize(("arch", "dtype", "cache_dtype", "tolerance"), readable)
def test_chunks_and_single_tokens_in_one_batch(
    arch: int, dtype: torch.dtype, cache_dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    case = attention_case(MIXED, heads=6, kv_heads=2, dtype=dtype, cache_dtype=cache_dtype)
    assert_close(_run(case, _launch(case, arch)), case.expected(), **tolerance)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(12, 1, 128), (9, 3, 64), (2, 2, 32), (5, 1, 16)]
)
def test_head_geometry(arch: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """Tiles of 128 rows end inside a token's heads, 12 of which make 10.67 tokens a tile."""
    spans = [(22, 40), (3, 18), (11, 11)]
    case = attention_case(spans, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.bfloat16)
    assert_close(_run(case, _launch(case, arch)), case.expected(), **BFLOAT16)


@pytest.mark.parametrize("tokens", [31, 32, 33, 63, 64, 65])
def test_chunks_that_end_at_tile_borders(tokens: int) -> None:
    """A tile has 32 rows of one head."""
    case = attention_case([(tokens, tokens), (tokens, 80), (1, 5)], heads=1)
    launch = replace(_launch(case), rows=32)
    assert_close(_run(case, launch), case.expected(), **FLOAT32)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_tiles_that_are_parts_of_a_block(block_size: int) -> None:
    case = attention_case([(20, 150), (3, 64)], heads=6, block_size=block_size, dtype=torch.bfloat16)
    assert_close(_run(case, _launch(case)), case.expected(), **BFLOAT16)


def test_more_sequences_than_are_searched_at_once() -> None:
    spans = [(1, 1 + n % 20) for n in range(132)]
    spans[100:100] = [(50, 50)]
    case = attention_case(spans, heads=1)
    assert_close(_run(case, _launch(case)), case.expected(), **FLOAT32)


def test_an_empty_step_launches_nothing_that_matters() -> None:
    case = attention_case([(0, 5), (0, 0)])
    assert _run(case, _launch(case)).shape == (0, 192)


@pytest.mark.parametrize("fragment_order", [False, True])
@pytest.mark.parametrize(("head_dim", "heads"), [(64, 3), (128, 3), (16, 12)])
def test_columns_in_fragment_order(head_dim: int, heads: int, fragment_order: bool) -> None:
    case = attention_case([(9, 37), (1, 5)], heads=heads, head_dim=head_dim, dtype=torch.bfloat16)
    output = _run(case, _launch(case), fragment_order=fragment_order)
    natural = _run(case, _launch(case))
    assert torch.equal(output, to_fragment_order(natural) if fragment_order else natural)


def test_slices_of_larger_tensors() -> None:
    """Queries inside q, k and v; one layer of a cache of two; a wide table; spare columns of output."""
    case = attention_case([(9, 37), (2, 20)], heads=6, kv_heads=2)
    wide_query = torch.full((11, 10, 16), torch.nan, device=DEVICE)
    wide_query[:, :6] = case.query
    wide_table = torch.full((2, 9), 1 << 20, dtype=torch.int32, device=DEVICE)
    wide_table[:, : case.block_tables.shape[1]] = case.block_tables
    keys, values = (
        torch.stack((torch.full_like(x, torch.nan), x), 1)[:, 1] for x in (case.cache.keys, case.cache.values)
    )
    output = torch.full((11, 128), 5.0, device=DEVICE)
    sliced = replace(
        case,
        query=wide_query[:, :6],
        cache=KVCacheLayer(keys, values),
        block_tables=wide_table[:, : case.block_tables.shape[1]],
    )
    _run(sliced, _launch(sliced), output=output[:, 16:112])
    assert_close(output[:, 16:112], case.expected(), **FLOAT32)
    assert (output[:, :16] == 5).all() and (output[:, 112:] == 5).all()


def _part(case: AttentionCase, first: int, last: int) -> AttentionCase:
    """Sequences first .. last of the batch, with all its queries."""
    return replace(
        case,
        block_tables=case.block_tables[first:last],
        context_lengths=case.context_lengths[first:last],
        query_starts=case.query_starts[first : last + 1],
    )


def test_prefill_and_decode_share_an_output() -> None:
    """Of a batch, the single tokens in front go to decode, what follows to prefill."""
    case = attention_case([(1, 33), (1, 16), (1, 1), (40, 40), (9, 50)], heads=6, kv_heads=2)
    single, chunks = _part(case, 0, 3), _part(case, 3, 5)
    launch = decode_launch(
        case.shape,
        ARCHES[0],
        num_sequences=3,
        max_query_len=1,
        max_context=case.max_context,
        block_size=case.block_size,
        cache_dtype=torch.float32,
    )
    output = case.empty_output()
    paged_decode_attention(
        *single.tensors, **case.options, output=output, max_query_len=1, fragment_order=False, launch=launch
    )
    assert output[3:].isnan().all()
    _run(chunks, _launch(case), output=output)
    assert_close(output, case.expected(), **FLOAT32)


@interpreted_only
def test_blocks_further_than_32_bits_can_count() -> None:
    """Blocks 2^30 elements apart, in memory of which nothing else is touched."""
    case = attention_case([(20, 45)], cache_dtype=FP8)
    distance = 1 << 30
    far = []
    for blocks in (case.cache.keys, case.cache.values):
        storage = torch.from_numpy(np.empty(4 * distance, np.uint8)).view(FP8)
        places = storage.as_strided(blocks.shape, (distance, *blocks.stride()[1:]))
        places.copy_(blocks)
        far.append(places)
    case = replace(case, cache=KVCacheLayer(*far))
    assert_close(_run(case, _launch(case, 90)), case.expected(), max_error=3e-3, rms_error=3e-4)


def test_the_future_is_not_seen() -> None:
    case = attention_case([(20, 30)], heads=3)
    first = _run(case, _launch(case))
    last_block, slot = case.block_tables[0, 1], 29 % case.block_size
    case.cache.keys[last_block, :, slot] = 100.0
    case.cache.values[last_block, :, :, slot] = -100.0
    second = _run(case, _launch(case))
    assert torch.equal(first[:19], second[:19])
    assert not torch.equal(first[19], second[19])


def test_two_runs_are_equal_bit_for_bit() -> None:
    case = attention_case(MIXED, dtype=torch.bfloat16)
    assert torch.equal(_run(case, _launch(case)), _run(case, _launch(case)))


# The launch.


def test_an_fp8_cache_is_refused_where_it_cannot_be_read() -> None:
    shape = AttentionShape(num_heads=96, num_kv_heads=8, head_dim=128, rotary_dim=64)
    with pytest.raises(ValueError, match="sm_80 cannot read an FP8 cache"):
        prefill_launch(shape, 80, block_size=64, cache_dtype=FP8)


def test_launches_are_recorded_without_data() -> None:
    case = attention_case([(9, 37), (1, 5)])
    meta = {name: x.to("meta") for name, x in vars(case).items() if isinstance(x, Tensor)}
    cache = KVCacheLayer(case.cache.keys.to("meta"), case.cache.values.to("meta"))
    with recorded_launches() as launches:
        _run(replace(case, cache=cache, **meta), _launch(case, 90))
    (launch,) = launches
    assert launch.grid == (10 * 12 // 32 + 2, 1)
