from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.checkpoint.checkpoint import Span
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.parameters import Parameter, Shard, expected_parameters
from nybble.engine.planning.placement import Placement, Split, share, stage_layers

GLM_4_7: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "glm-4.7-config.json").read_text())
SMALL = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_routed_experts": 7,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "eos_token_id": 0,
}
CONFIG = ModelConfig.from_fields(GLM_4_7 | SMALL)
# 1, 2 and 4 divide the 4 KV heads; 8, 12 and 24 replicate them. All divide heads, neurons and vocabulary.
SPLITS = [Split(tp, ep, 1) for tp in (1, 2, 4, 8, 12, 24) for ep in sorted({1, tp}) if ep <= 7]


def _ranks(split: Split) -> list[Placement]:
    return [Placement(split, rank) for rank in range(split.num_ranks)]


def _counts(ranges: Iterable[range]) -> Counter[int]:
    """How many of the ranges each number is in."""
    return Counter(number for numbers in ranges for number in numbers)


# Ranks and stages.


def test_ranks_of_a_stage_are_neighbours() -> None:
    places = _ranks(Split(tensor_parallel=3, pipeline_parallel=2))
    assert [(p.stage, p.tensor_rank) for p in places] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [p.is_first_stage for p in places] == [True] * 3 + [False] * 3
    assert [p.is_last_stage for p in places] == [False] * 3 + [True] * 3


def test_expert_parallel_ranks_are_those_of_tensor_parallel() -> None:
    assert Split(8, 8, 3).num_ranks == Split(8, 1, 3).num_ranks == 24
    assert str(Split(8, 4, 3)) == "TP 8, EP 4, PP 3"


def test_a_rank_alone_holds_everything() -> None:
    alone = Placement()
    assert alone.is_first_stage and alone.is_last_stage
    assert alone.layers(92) == range(92)
    assert alone.units(8) == range(8)
    assert alone.experts(160) == range(160)
    assert {alone.span(parameter) for parameter in expected_parameters(CONFIG)} == {None}


@given(st.integers(1, 100), st.integers(1, 100))
def test_stages_tile_the_layers_in_order(num_layers: int, num_stages: int) -> None:
    stages = [stage_layers(num_layers, stage, num_stages) for stage in range(num_stages)]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)  # the last has the head


def test_the_stages_of_glm_4_7() -> None:
    split = Split(tensor_parallel=2, pipeline_parallel=3)
    layers = [place.layers(92) for place in _ranks(split)]
    assert layers == [range(31)] * 2 + [range(31, 62)] * 2 + [range(62, 92)] * 2


# Shares.


@given(st.integers(1, 200), st.integers(1, 200))
def test_shares_tile_and_are_even(num_units: int, num_ranks: int) -> None:
    shares = [share(num_units, rank, num_ranks) for rank in range(num_ranks)]
    counts = _counts(shares)
    assert set(counts) == set(range(num_units))
    assert [part.start for part in shares] == sorted(part.start for part in shares)
    if num_units >= num_ranks:
        assert set(counts.values()) == {1}
        assert {len(part) for part in shares} <= {num_units // num_ranks, -(-num_units // num_ranks)}
    else:
        assert {len(part) for part in shares} == {1}
        assert max(counts.values()) - min(counts.values()) <= 1


def test_experts_need_not_divide_evenly() -> None:
    assert [list(place.experts(7)) for place in _ranks(Split(3, 3, 1))] == [[0, 1], [2, 3], [4, 5, 6]]


def test_without_expert_parallel_a_rank_has_a_share_of_every_expert() -> None:
    assert {place.experts(7) for place in _ranks(Split(3, 1, 2))} == {range(7)}


def test_experts_are_divided_alike_on_every_stage() -> None:
    places = _ranks(Split(3, 3, 2))
    assert [place.experts(7) for place in places[:3]] == [place.experts(7) for place in places[3:]]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_a_query_head_is_beside_its_kv_head(num_kv_heads: int, group: int, factor: int) -> None:
    """On every number of ranks that divides the KV heads or is a multiple of them. On a rank, as in the
    whole model, each KV head serves as many consecutive query heads."""
    heads = num_kv_heads * group
    legal = [n for n in range(1, heads + 1) if not heads % n and not (num_kv_heads % n and n % num_kv_heads)]
    for place in _ranks(Split(tensor_parallel=legal[factor % len(legal)])):
        queries, keys = place.units(heads), place.units(num_kv_heads)
        assert len(queries) % len(keys) == 0
        for row, head in enumerate(queries):
            assert keys[row // (len(queries) // len(keys))] == head // group


# Spans.


def _rows_held(place: Placement, parameter: Parameter) -> range:
    """Indices of the divided dimension that a rank holds."""
    span = place.span(parameter)
    if span is None:
        return range(parameter.shape[parameter.shard.axis if parameter.shard else 0])
    assert parameter.shard is not None and span.axis == parameter.shard.axis
    return range(span.start, span.stop)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_spans_of_a_stage_tile_every_parameter(split: Split) -> None:
    for parameter in expected_parameters(CONFIG):
        counts = _counts(_rows_held(place, parameter) for place in _ranks(split))
        copies = split.tensor_parallel
        if parameter.shard is not None and not (parameter.is_expert and split.expert_parallel > 1):
            copies = max(1, split.tensor_parallel // parameter.shard.num_units)
        axis = parameter.shard.axis if parameter.shard else 0
        assert counts == dict.fromkeys(range(parameter.shape[axis]), copies), parameter


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_stages_divide_alike(split: Split) -> None:
    staged = _ranks(Split(split.tensor_parallel, split.expert_parallel, 3))
    for parameter in expected_parameters(CONFIG):
        expected = [place.span(parameter) for place in _ranks(split)]
        assert [place.span(parameter) for place in staged] == 3 * expected


@pytest.mark.parametrize("split", [split for split in SPLITS if split.tensor_parallel > 1], ids=str)
def test_only_kv_heads_are_held_twice(split: Split) -> None:
    copied = {
        parameter.name.split(".")[-2]
        for parameter in expected_parameters(CONFIG)
        if parameter.shard is not None and split.tensor_parallel > parameter.shard.num_units
    }
    assert copied == ({"k_proj", "v_proj"} if split.tensor_parallel > 4 else set())


@pytest.mark.parametrize(
    ("parameter", "rank", "span"),
    [
        # 4 pieces of 6 rows on 8 ranks: ranks 4 and 5 hold the third.
        (Parameter("k", (24, 5), shard=Shard(0, 4)), 4, Span(0, 12, 18)),
        (Parameter("k", (24, 5), shard=Shard(0, 4)), 5, Span(0, 12, 18)),
        (Parameter("q", (48, 5), shard=Shard(0, 8)), 5, Span(0, 30, 36)),
        (Parameter("bias", (48,), shard=Shard(0, 8)), 7, Span(0, 42, 48)),
        (Parameter("down", (5, 16), shard=Shard(1, 16)), 3, Span(1, 6, 8)),
        (Parameter("norm", (48,)), 3, None),
        (Parameter("expert", (48, 5), shard=Shard(0, 48), is_expert=True), 1, Span(0, 6, 12)),
    ],
    ids=str,
)
def test_spans_written_out(parameter: Parameter, rank: int, span: Span | None) -> None:
    assert Placement(Split(8, 1, 2), 8 + rank).span(parameter) == span


def test_expert_parallel_ranks_hold_experts_whole_and_share_the_rest() -> None:
    place = Placement(Split(4, 4, 1), 1)
    shared = Parameter("shared", (48, 5), shard=Shard(0, 48))
    expert = Parameter("expert", (48, 5), shard=Shard(0, 48), is_expert=True)
    assert place.span(expert) is None
    assert place.span(shared) == Span(0, 12, 24)
