"""Against float64, in a cache whose unused slots hold NaN keys and large values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_case import FLOAT32, FP8, AttentionCase, attention_case
from closeness import assert_close
from poison import poisoned as poisoned
from torch import Tensor

from nybble.kernels.cpu.kv_cache_layout import from_slot_order
from nybble.kernels.cpu.paged_attention import paged_attention
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.ops import AttentionBatch, KVCacheLayer
from nybble.kernels.triton.kv_cache_layout import from_head_major

SPANS = [(1, 33), (1, 1), (7, 20), (17, 17), (1, 16), (16, 48), (40, 150), (1, 129)]


def _cache(case: AttentionCase) -> KVCacheLayer:
    cache = from_slot_order(from_head_major(case.cache))
    return replace(cache, key_scale=case.key_scale, value_scale=case.value_scale)


def _batch(case: AttentionCase) -> AttentionBatch:
    return AttentionBatch(
        query_starts=case.query_starts,
        context_lengths=case.context_lengths,
        block_tables=case.block_tables,
        slots=torch.zeros(len(case.query), dtype=torch.int64),
        query_lengths=tuple(case.query_starts.diff().tolist()),
    )


def _run(pool: Pool, case: AttentionCase) -> Tensor:
    return paged_attention(pool, case.query, _cache(case), _batch(case))


def _one(case: AttentionCase, sequence: int, tokens: int) -> AttentionCase:
    """The last query tokens of one sequence, by themselves."""
    end = int(case.query_starts[sequence + 1])
    return replace(
        case,
        query=case.query[end - tokens : end].contiguous(),
        block_tables=case.block_tables[sequence : sequence + 1],
        context_lengths=case.context_lengths[sequence : sequence + 1],
        query_starts=torch.tensor([0, tokens], dtype=torch.int32),
        contexts=case.contexts[sequence : sequence + 1],
    )


@pytest.mark.parametrize(
    ("block_size", "cache_dtype"),
    [
        *((size, torch.float32) for size in (1, 8, 16, 24)),
        *((size, torch.bfloat16) for size in (3, 16, 200)),
        *((size, FP8) for size in (5, 16, 64)),
    ],
)
def test_blocks_of_any_size(pool: Pool, block_size: int, cache_dtype: torch.dtype) -> None:
    case = attention_case(SPANS, heads=6, kv_heads=2, block_size=block_size, cache_dtype=cache_dtype)
    assert_close(_run(pool, case), case.expected(), **FLOAT32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (4, 4, 5), (1, 1, 2), (12, 1, 128), (5, 1, 20), (40, 1, 8), (4, 2, 72)],
)
def test_head_geometry(pool: Pool, heads: int, kv_heads: int, head_dim: int) -> None:
    spans = [(1, 37), (1, 16), (9, 9)]
    for cache_dtype in (torch.float32, torch.bfloat16):
        case = attention_case(
            spans, heads=heads, kv_heads=kv_heads, head_dim=head_dim, cache_dtype=cache_dtype
        )
        assert_close(_run(pool, case), case.expected(), **FLOAT32)


BORDERS = (127, 128, 129, 511, 512, 513, 1024, 1300)


@pytest.mark.parametrize(
    "spans",
    [
        [(1, 513)],
        [(1, n) for n in BORDERS],
        [(5, 600), (100, 513), (1, 1025), (2, 2)],
    ],
    ids=str,
)
def test_contexts_that_end_at_the_borders_of_tiles_and_spans(
    pool: Pool, spans: list[tuple[int, int]]
) -> None:
    case = attention_case(spans, heads=6, kv_heads=2)
    assert_close(_run(pool, case), case.expected(), **FLOAT32)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0])
def test_flat_and_sharp_weights(pool: Pool, sharpness: float) -> None:
    case = attention_case([(1, 600), (9, 140)], sharpness=sharpness, head_dim=64)
    assert_close(_run(pool, case), case.expected(), max_error=1e-4, rms_error=1e-5)


def test_scores_far_from_zero_neither_overflow_nor_vanish(pool: Pool) -> None:
    case = attention_case([(1, 40), (1, 700)], sharpness=1.0)
    far = replace(case, query=case.query * 1e4)
    assert_close(_run(pool, far), far.expected(), max_error=1e-2, rms_error=1e-3)


def test_a_token_has_the_same_bits_whatever_else_is_in_the_step(pool: Pool) -> None:
    """Beside others, alone, with the tokens before it or without, with one thread or two."""
    case = attention_case([*SPANS, (20, 1100)], heads=6, kv_heads=2, head_dim=24)
    together = _run(pool, case)
    with Pool(1, pool.level) as alone:
        assert torch.equal(_run(alone, case), together)
    for sequence, end in enumerate(case.query_starts[1:].tolist()):
        for tokens in {1, min(4, end - int(case.query_starts[sequence]))}:
            assert torch.equal(_run(pool, _one(case, sequence, tokens)), together[end - tokens : end])


def test_nan_stays_in_its_sequence(pool: Pool) -> None:
    case = attention_case([(1, 600), (3, 40), (1, 90)], heads=4, kv_heads=2)
    expected = _run(pool, case)
    case.query[2] = torch.nan
    result = _run(pool, case)
    assert result[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(result[others], expected[others])


def test_no_tokens(pool: Pool) -> None:
    case = attention_case([(1, 16)])
    empty = replace(
        case,
        query=case.query[:0],
        block_tables=case.block_tables[:0],
        context_lengths=case.context_lengths[:0],
        query_starts=torch.zeros(1, dtype=torch.int32),
    )
    assert _run(pool, empty).shape == (0, 12 * 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"block_tables": torch.tensor([[1, 9]], dtype=torch.int32)},
            "blocks 1 to 9, but the cache 3 blocks",
        ),
        ({"block_tables": torch.tensor([[-1, 0]], dtype=torch.int32)}, "blocks -1 to 0, but the cache"),
        ({"block_tables": torch.tensor([[1, 2]])}, "block_tables is torch.int64"),
        (
            {"context_lengths": torch.tensor([33], dtype=torch.int32)},
            "33 tokens, but block tables have 2 blocks",
        ),
        (
            {"context_lengths": torch.tensor([3], dtype=torch.int32)},
            "sequence 0 has 4 queries, but a context of 3",
        ),
        ({"context_lengths": torch.tensor([20, 20], dtype=torch.int32)}, "context_lengths is"),
        ({"query_starts": torch.tensor([0, 5], dtype=torch.int32)}, "query has 4 tokens, but the batch 5"),
        ({"query_starts": torch.tensor([1, 4], dtype=torch.int32)}, r"query_starts are \[1, 4\]"),
        ({"query_starts": torch.tensor([0, 0], dtype=torch.int32)}, r"query_starts are \[0, 0\]"),
        ({"query": torch.zeros(4, 12, 16, dtype=torch.bfloat16)}, "query is torch.bfloat16"),
        ({"query": torch.zeros(4, 12, 8)}, "query has 12 heads of 8, but the cache 1 of 16"),
        ({"query": torch.zeros(4, 16, 12).mT}, "query is torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(pool: Pool, change: dict[str, Any], message: str) -> None:
    case = attention_case([(4, 20)])
    with pytest.raises(ValueError, match=message):
        _run(pool, replace(case, **change))
