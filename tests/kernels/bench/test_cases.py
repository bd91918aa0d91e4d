"""Which cases there are, what they are called, and what a rank's share of the model is."""

from __future__ import annotations

import pytest

from nybble.kernels.bench.cases import (
    CONTEXTS,
    FP4_FORMATS,
    GLM_4_7,
    LINEAR_OPS,
    OPS,
    ROUTINGS,
    TOKENS,
    TPS,
    BenchCase,
    Selection,
    select_cases,
)


def test_experts_at_every_size() -> None:
    cases = select_cases(Selection(ops=("experts",)))
    assert len(cases) == len(set(cases)) == len(FP4_FORMATS) * len(TPS) * len(TOKENS) * len(ROUTINGS)
    assert {case.tokens for case in cases} == {1, 2, 4, 8, 16, 32, 64, 128, 512, 4096, 16384}


def test_attention_to_the_longest_context() -> None:
    cases = select_cases(Selection(ops=("attention",)))
    assert {case.context for case in cases} == set(CONTEXTS) and max(CONTEXTS) == 202_752
    assert {(case.tokens, case.format) for case in cases} == {
        (tokens, format) for tokens in (1, 8, 32, 128) for format in ("bf16", "fp8")
    }


def test_a_chunk_is_not_longer_than_its_context() -> None:
    cases = select_cases(Selection(ops=("prefill_attention",)))
    assert cases and all(case.context is not None and case.tokens <= case.context for case in cases)


def test_all_together() -> None:
    cases = select_cases(Selection())
    assert len({case.name for case in cases}) == len(cases)
    assert [*dict.fromkeys(case.op for case in cases)] == list(OPS)


def test_the_quick_ones_are_few_and_of_every_kind() -> None:
    cases = select_cases(Selection(quick=True))
    assert len({case.name for case in cases}) == len(cases) < 30
    assert {case.op for case in cases} >= set(OPS) - set(LINEAR_OPS)
    assert {case.format for case in cases} == {"nvfp4", "mxfp4", "fp8", "bf16", "fp32"}


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (
            Selection(ops=("qkv",), tps=(8,), tokens=(1,), formats=("nvfp4",)),
            ["qkv nvfp4, tp 8, tokens 1"],
        ),
        (
            Selection(ops=("qkv",), tps=(2,), tokens=(3,), formats=("fp8",)),
            ["qkv fp8, tp 2, tokens 3"],
        ),
        (
            Selection(ops=("attention",), tps=(8,), tokens=(2,), contexts=(4096,), formats=("bf16",)),
            ["attention bf16, tp 8, tokens 2, context 4096"],
        ),
        (
            Selection(quick=True, ops=("experts",), tokens=(1,)),
            ["experts nvfp4, tp 8, tokens 1, zipf", "experts mxfp4, tp 8, tokens 1, zipf"],
        ),
        (Selection(ops=("qkv",), formats=("fp32",)), []),
    ],
)
def test_selection(selection: Selection, names: list[str]) -> None:
    assert [case.name for case in select_cases(selection)] == names


def test_a_rank_of_eight() -> None:
    shard = GLM_4_7.shard(8)
    assert (shard.heads.num_heads, shard.heads.num_kv_heads) == (12, 1)
    assert shard.matrix("qkv") == (14 * 128, 5120)
    assert shard.matrix("output") == (5120, 12 * 128)
    assert shard.matrix("dense_gate_up") == (2 * 1536, 5120)
    assert shard.matrix("dense_down") == (5120, 1536)
    assert shard.matrix("head") == (18944, 5120)
    assert (shard.num_experts, shard.expert_width) == (160, 192)


def test_kv_heads_are_repeated_where_there_are_too_few() -> None:
    assert GLM_4_7.shard(16).heads.num_kv_heads == 1


def test_options_select_the_case_again() -> None:
    case = BenchCase("attention", 8, 32, "fp8", context=8192)
    assert case.options == "--op attention --tp 8 --tokens 32 --format fp8 --context 8192"
    experts = BenchCase("experts", 4, 1, "nvfp4", "zipf")
    assert experts.options.endswith("--format nvfp4 --routing zipf")
