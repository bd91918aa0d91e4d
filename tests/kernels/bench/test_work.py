"""Bytes and products of cases, against sums done by hand."""

from __future__ import annotations

import pytest

from nybble.kernels.bench.cases import GLM_4_7, OPS, BenchCase, Selection, select_cases
from nybble.kernels.bench.routing import expert_counts, expert_ids
from nybble.kernels.bench.work import Work, case_work


def work(op: str, tokens: int, format: str, tp: int = 8, **rest: object) -> Work:
    return case_work(BenchCase(op, tp, tokens, format, **rest), GLM_4_7)  # type: ignore[arg-type]


def test_one_token_reads_its_experts_and_the_shared_one() -> None:
    weights = 9 * 3 * 1536 * 5120
    found = work("experts", 1, "nvfp4", tp=1, routing="uniform")
    assert found.num_bytes == pytest.approx(weights * 0.5625, rel=1e-3)
    assert found.flops == 2 * weights


def test_an_expert_is_read_once() -> None:
    ids = expert_ids(64, 160, 8, "zipf")
    used = 1 + sum(count > 0 for count in expert_counts(ids, 160))
    found = work("experts", 64, "mxfp4", routing="zipf")
    assert found.num_bytes == pytest.approx(used * 3 * 192 * 5120 * 17 / 32, rel=0.1)
    assert found.flops == 2 * 64 * 9 * 3 * 192 * 5120


@pytest.mark.parametrize(
    ("format", "bytes_"), [("nvfp4", 0.5625), ("mxfp4", 0.53125), ("fp8", 1), ("bf16", 2)]
)
def test_linear(format: str, bytes_: float) -> None:
    found = work("qkv", 3, format)
    assert found.num_bytes == round(1792 * 5120 * bytes_) + 3 * 2 * (1792 + 5120)
    assert found.flops == 2 * 3 * 1792 * 5120


def test_logits_are_float32() -> None:
    assert work("head", 2, "bf16").num_bytes == 18944 * 5120 * 2 + 2 * (5120 * 2 + 18944 * 4)


def test_attention_reads_the_cache() -> None:
    found = work("attention", 4, "fp8", context=1000)
    assert found.num_bytes == 2 * 4000 * 128 + 2 * 4 * 12 * 128 * 2
    assert found.flops == 4 * 4000 * 12 * 128


def test_a_chunk_reads_its_context_once() -> None:
    found = work("prefill_attention", 2, "bf16", context=10)
    assert found.num_bytes == 2 * 10 * 128 * 2 + 2 * 2 * 12 * 128 * 2
    assert found.flops == 4 * (9 + 10) * 12 * 128


def test_every_case_has_work() -> None:
    assert {case.op for case in select_cases(Selection()) if case_work(case, GLM_4_7).num_bytes > 0} == set(
        OPS
    )
