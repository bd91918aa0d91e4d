"""What the operations are made of has tests of its own; here, that they are put together as `Ops` says."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from cpu_weights import random_float
from poison import poisoned as poisoned
from sampling_rows import normal, request_batch

from nybble.kernels.cpu.cpu_matrix import CpuMatrix, dequantize
from nybble.kernels.cpu.cpu_ops import CpuOps
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.logit_adjustments import LogitAdjustments, LogitBias
from nybble.kernels.ops import AttentionShape, AttentionWeights, Embedding, RmsNorm
from nybble.kernels.reference_ops import ReferenceOps

REFERENCE = ReferenceOps(torch.float32)
NORM = RmsNorm(normal(64, seed=1), 1e-5)


def _head(ops: CpuOps, rows: int = 300) -> CpuMatrix:
    return ops.prepare_weight(random_float(rows, 64))


def test_logits_are_of_the_norm(pool: Pool) -> None:
    ops, hidden = CpuOps(pool, "bf16"), normal(5, 64)
    head = _head(ops)
    logits = ops.logits(hidden, NORM, head)
    assert_close(logits, REFERENCE.logits(hidden, NORM, dequantize(head)), max_error=1e-5, rms_error=1e-6)
    assert torch.equal(logits, ops.linear(ops.rms_norm(hidden, NORM), head))


def test_the_attention_output_is_projected(pool: Pool) -> None:
    ops, attended = CpuOps(pool, "bf16"), normal(3, 64)
    matrix = _head(ops, 96)
    weights = AttentionWeights(AttentionShape(4, 4, 16, 16), NORM, matrix, None, None, None, matrix)
    expected = attended @ dequantize(matrix).T
    assert_close(ops.attention_output(attended, weights), expected, max_error=1e-5, rms_error=1e-6)


def test_floats_become_what_was_asked_for(pool: Pool) -> None:
    weight = random_float(32, 64)
    exact = dequantize(CpuOps(pool, "bf16").prepare_weight(weight))
    assert torch.equal(exact, weight.bfloat16().float())
    rounded = dequantize(CpuOps(pool).prepare_weight(weight))
    assert_close(rounded, weight, max_error=4e-2, rms_error=8e-3)
    assert not torch.equal(rounded, exact)


def test_embeddings_of_another_rank_are_zeros(pool: Pool) -> None:
    table = normal(10, 8)
    found = CpuOps(pool).embed(torch.tensor([20, 29, 30, 3]), Embedding(table, first_id=20))
    assert torch.equal(found[:2], table[[0, 9]])
    assert not found[2:].any()


def test_rows_with_filters_and_without(pool: Pool) -> None:
    logits = normal(7, 1000, scale=3)
    batch = request_batch(
        (1.0, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (0.0, 0, 1.0, 0.0),
        (0.7, 0, 0.5, 0.0),
        (0.0, 3, 0.5, 0.1),
        (1.5, 0, 1.0, 0.2),
        (3.0, 0, 1.0, 0.0),
    )
    expected = REFERENCE.sample(logits, batch, 900)
    assert torch.equal(CpuOps(pool).sample(logits, batch, 900), expected)


def test_adjustments_and_logprobs_are_the_references(pool: Pool) -> None:
    ops, logits = CpuOps(pool), normal(2, 50)
    starts, ids, values = torch.tensor([0, 1, 1]), torch.tensor([7], dtype=torch.int32), torch.tensor([3.0])
    expected = logits.clone()
    expected[0, 7] += 3
    ops.adjust_logits(logits, LogitAdjustments(LogitBias(starts.int(), ids, values)))
    assert torch.equal(logits, expected)
    found = ops.token_logprobs(logits, torch.tensor([7, 3]), 50, 4)
    assert torch.equal(found.chosen, expected.log_softmax(-1)[[0, 1], [7, 3]])
    assert torch.equal(found.top_ids, expected.sort(descending=True).indices[:, :4])


def test_the_cache_is_in_host_memory(pool: Pool) -> None:
    ops = CpuOps(pool)
    cache = ops.new_kv_cache(3, 4, 2, 8, torch.bfloat16, torch.device("cpu"))
    assert cache.keys.shape == (3, 2, 8, 4)
    with pytest.raises(ValueError, match="KV cache on meta"):
        ops.new_kv_cache(3, 4, 2, 8, torch.bfloat16, torch.device("meta"))
