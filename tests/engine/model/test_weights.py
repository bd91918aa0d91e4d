"""What ranks load, put together again, is what one rank loads; and they read nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import make_checkpoint
from torch import Tensor

from nybble.engine.checkpoint.checkpoint import Checkpoint, Span
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.quantize_checkpoint import quantize_checkpoint
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe
from nybble.engine.model.weights import HeadWeights, LayerWeights, ModelWeights, load_weights
from nybble.engine.planning.placement import Placement, Split
from nybble.kernels.ops import AttentionWeights, DenseWeights, Embedding, MlpWeights, MoeWeights, RmsNorm
from nybble.kernels.reference_ops import ReferenceOps

# Layers: 0 dense, 1 and 2 sparse. 4 heads and 2 KV heads. FP4 blocks of 16 are whole on 4 ranks.
SIZES: dict[str, Any] = {"intermediate_size": 192, "moe_intermediate_size": 64, "n_routed_experts": 7}
SPLITS = [
    Split(2, 1, 1),
    Split(4, 1, 1),  # two ranks hold each KV head
    Split(2, 2, 1),  # 3 experts and 4
    Split(4, 4, 1),
    Split(1, 1, 2),
    Split(1, 1, 3),
    Split(2, 1, 3),
    Split(4, 4, 2),
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weights")
    make_checkpoint(root / "floats", seed=41, **SIZES)
    make_checkpoint(root / "tied", seed=42, tie_word_embeddings=True, **SIZES)
    make_checkpoint(root / "plain", seed=43, attention_bias=False, use_qk_norm=False, **SIZES)
    quantize_checkpoint(root / "floats", root / "quantized", QuantizeRecipe("nvfp4", attention="fp8"))
    return {name: root / name for name in ("floats", "tied", "plain", "quantized")}


def _load(checkpoint: Checkpoint, placement: Placement | None = None, **options: Any) -> ModelWeights[Tensor]:
    config = ModelConfig.from_directory(checkpoint.directory)
    dtype, device = torch.float32, torch.device("cpu")
    return load_weights(
        checkpoint, config, ReferenceOps(dtype), device, dtype, placement=placement, **options
    )


def _load_ranks(directory: Path, split: Split) -> list[ModelWeights[Tensor]]:
    checkpoint = Checkpoint.open(directory)
    return [_load(checkpoint, Placement(split, rank)) for rank in range(split.num_ranks)]


# Putting together. `ranks` are those of a stage.


def _join(ranks: Sequence[ModelWeights[Tensor]], split: Split) -> ModelWeights[Tensor]:
    """The weights of the whole model; what all ranks of a stage hold must be equal on all."""
    tp = split.tensor_parallel
    stages = [ranks[start : start + tp] for start in range(0, len(ranks), tp)]
    tables = [rank.embedding for rank in stages[0] if rank.embedding is not None]
    heads = [rank.head for rank in stages[-1] if rank.head is not None]
    assert len(tables) == len(heads) == tp
    starts = [table.first_id for table in tables]
    assert starts == [sum(len(table.table) for table in tables[:rank]) for rank in range(tp)]
    norm = _same_norm([head.norm for head in heads])
    return ModelWeights(
        embedding=Embedding(torch.cat([table.table for table in tables])),
        layers=tuple(
            _join_layers([rank.layers[row] for rank in stage], split)
            for stage in stages
            for row in range(len(stage[0].layers))
        ),
        head=HeadWeights(norm, matrix=torch.cat([head.matrix for head in heads])),
    )


def _join_layers(ranks: Sequence[LayerWeights[Tensor]], split: Split) -> LayerWeights[Tensor]:
    attention = _join_attention([rank.attention for rank in ranks])
    forwards = [rank.feed_forward for rank in ranks]
    norm = _same_norm([forward.norm for forward in forwards])
    if isinstance(forwards[0], DenseWeights):
        mlps = [forward.mlp for forward in forwards if isinstance(forward, DenseWeights)]
        return LayerWeights(attention, DenseWeights(norm, _join_neurons(mlps)))
    moes = [forward for forward in forwards if isinstance(forward, MoeWeights)]
    return LayerWeights(attention, replace(_join_moe(moes, split), norm=norm))


def _join_attention(ranks: Sequence[AttentionWeights[Tensor]]) -> AttentionWeights[Tensor]:
    biases = [rank.qkv_bias for rank in ranks if rank.qkv_bias is not None]
    heads = sum(rank.shape.num_heads for rank in ranks)
    return AttentionWeights(
        shape=replace(ranks[0].shape, num_heads=heads, num_kv_heads=2),
        norm=_same_norm([rank.norm for rank in ranks]),
        qkv=_join_heads(ranks, [rank.qkv for rank in ranks]),
        qkv_bias=_join_heads(ranks, biases) if biases else None,
        query_norm=ranks[0].query_norm and _same_norm([rank.query_norm for rank in ranks]),
        key_norm=ranks[0].key_norm and _same_norm([rank.key_norm for rank in ranks]),
        output=torch.cat([rank.output for rank in ranks], dim=1),
    )


def _join_heads(ranks: Sequence[AttentionWeights[Tensor]], fused: Sequence[Tensor]) -> Tensor:
    """Of ranks that hold the same KV head, one counts and the others must equal it."""
    shape = ranks[0].shape
    widths = [shape.query_width, shape.kv_width, shape.kv_width]
    parts = [torch.split(part, widths) for part in fused]
    copies = len(ranks) * shape.num_kv_heads // 2
    queries = torch.cat([query for query, _, _ in parts])
    keys, values = ([part[kind] for part in parts] for kind in (1, 2))
    joined = (
        torch.cat([_same(kind[start : start + copies]) for start in range(0, len(ranks), copies)])
        for kind in (keys, values)
    )
    return torch.cat((queries, *joined))


def _join_moe(ranks: Sequence[MoeWeights[Tensor]], split: Split) -> MoeWeights[Tensor]:
    stacks = [rank.experts for rank in ranks]
    routers = [rank.router for rank in ranks]
    router = replace(
        routers[0], weight=_same([r.weight for r in routers]), bias=_same([r.bias for r in routers])
    )
    if split.expert_parallel > 1:
        experts = MlpWeights(torch.cat([s.gate_up for s in stacks]), torch.cat([s.down for s in stacks]))
        starts = [sum(len(stack.down) for stack in stacks[:rank]) for rank in range(len(ranks))]
    else:
        experts, starts = _join_neurons(stacks), [0] * len(ranks)
    assert [rank.first_expert for rank in ranks] == starts
    shared = _join_neurons([rank.shared_expert for rank in ranks])
    return replace(ranks[0], router=router, experts=experts, shared_expert=shared)


def _join_neurons(ranks: Sequence[MlpWeights[Tensor]]) -> MlpWeights[Tensor]:
    halves = [rank.gate_up.chunk(2, dim=-2) for rank in ranks]
    gates, ups = ([half[kind] for half in halves] for kind in (0, 1))
    return MlpWeights(torch.cat([*gates, *ups], dim=-2), torch.cat([rank.down for rank in ranks], dim=-1))


def _same(parts: Sequence[Tensor]) -> Tensor:
    assert all(torch.equal(part, parts[0]) for part in parts[1:])
    return parts[0]


def _same_norm(norms: Sequence[RmsNorm | None]) -> RmsNorm:
    present = [norm for norm in norms if norm is not None]
    assert len(present) == len(norms)
    return replace(present[0], weight=_same([norm.weight for norm in present]))


def _values(weights: object, name: str = "") -> dict[str, Any]:
    """Every tensor and number by its place."""
    if isinstance(weights, tuple):
        fields = {str(number): item for number, item in enumerate(weights)}
    else:
        fields = getattr(weights, "__dict__", {})
    if not fields:
        return {name: weights}
    return {key: v for part, item in fields.items() for key, v in _values(item, f"{name}.{part}").items()}


def _assert_equal(actual: ModelWeights[Tensor], expected: ModelWeights[Tensor]) -> None:
    found, wanted = _values(actual), _values(expected)
    assert found.keys() == wanted.keys()
    assert sum(isinstance(value, Tensor) for value in wanted.values()) > 20
    for name, value in wanted.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kind", ["floats", "tied", "plain", "quantized"])
def test_the_ranks_together_hold_what_one_holds(
    kind: str, split: Split, directories: dict[str, Path]
) -> None:
    ranks = _load_ranks(directories[kind], split)
    _assert_equal(_join(ranks, split), _load(Checkpoint.open(directories[kind])))


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_rank_holds_its_share(split: Split, directories: dict[str, Path]) -> None:
    """Figures that joining does not see: the ranks' shapes themselves."""
    for rank in _load_ranks(directories["floats"], split):
        for layer in rank.layers:
            shape = layer.attention.shape
            assert shape.num_heads == 4 // split.tensor_parallel
            assert shape.num_kv_heads == max(1, 2 // split.tensor_parallel)
            assert len(layer.attention.qkv) == shape.query_width + 2 * shape.kv_width
            if isinstance(layer.feed_forward, MoeWeights):
                assert layer.feed_forward.router.weight.shape == (7, 64)


@pytest.mark.parametrize("kind", ["floats", "tied"])
def test_the_ends_stand_on_the_end_stages(kind: str, directories: dict[str, Path]) -> None:
    ranks = _load_ranks(directories[kind], Split(2, 1, 3))
    assert [rank.embedding is not None for rank in ranks] == [True, True, False, False, False, False]
    assert [rank.head is not None for rank in ranks] == [False, False, False, False, True, True]


def test_layers_are_reported_by_their_number_in_the_model(directories: dict[str, Path]) -> None:
    checkpoint, loaded = Checkpoint.open(directories["floats"]), [list[int]() for _ in range(2)]
    for rank in range(2):
        weights = _load(checkpoint, Placement(Split(1, 1, 2), rank), on_layer=loaded[rank].append)
        assert len(weights.layers) == len(loaded[rank])
    assert loaded == [[0, 1], [2]]


# What is read of the files.


@dataclass
class Reads:
    """Bytes read of each tensor, and how often it was read."""

    num_bytes: Counter[str] = field(default_factory=Counter)
    times: Counter[str] = field(default_factory=Counter)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    recorded, read_into = Reads(), Checkpoint.read_into

    def recording(checkpoint: Checkpoint, wanted: Iterable[tuple[str, Span | None, Tensor]]) -> None:
        wanted = list(wanted)
        for name, span, out in wanted:
            entry = checkpoint.entries[name]
            divided = entry.shape[span.axis] if span else 1
            part = span.stop - span.start if span else 1
            assert out.nbytes == entry.num_bytes * part // divided
            recorded.num_bytes[name] += out.nbytes
            recorded.times[name] += 1
        read_into(checkpoint, wanted)

    monkeypatch.setattr(Checkpoint, "read_into", recording)
    return recorded


def _layer_of(name: str) -> int | None:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


@pytest.mark.parametrize("kind", ["floats", "tied", "quantized"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_rank_reads_only_its_stage_and_each_tensor_once(
    kind: str, split: Split, directories: dict[str, Path], reads: Reads
) -> None:
    checkpoint = Checkpoint.open(directories[kind])
    for place in (Placement(split, rank) for rank in range(split.num_ranks)):
        reads.times.clear()
        _load(checkpoint, place)
        layers = {_layer_of(name) for name in reads.times} - {None}
        assert layers == set(place.layers(3))
        assert set(reads.times.values()) == {1}
        ends = {name for name in reads.times if _layer_of(name) is None}
        first = {"model.embed_tokens.weight"} if place.is_first_stage else set()
        head = "model.embed_tokens.weight" if kind == "tied" else "lm_head.weight"
        last = {"model.norm.weight", head} if place.is_last_stage else set()
        assert ends == first | last


# By how many of 4 ranks each byte is read: of 2 KV heads by 2, of what is not divided by all.
COPIES = {
    r"self_attn\.[kv]_proj\.(weight|weight_scale|bias)": 2,
    r".*norm\.weight": 4,
    r"mlp\.gate\..*": 4,
    r"mlp\.experts\.\d+\.\w+\.weight_scale_2": 4,
    r"mlp\.\w+\.weight_scale_2": 4,
    r"mlp\.shared_experts\.\w+\.weight_scale_2": 4,
    r"self_attn\.o_proj\.weight_scale": 4,  # FP8: one for each row, of which ranks have columns
}


def _copies(name: str, split: Split) -> int:
    below = re.sub(r"^model\.(layers\.\d+\.)?", "", name)
    if split.expert_parallel > 1 and ".experts." in name:
        return 1
    return next((copies for pattern, copies in COPIES.items() if re.fullmatch(pattern, below)), 1)


@pytest.mark.parametrize("split", [Split(4, 1, 1), Split(4, 4, 1), Split(4, 1, 3)], ids=str)
def test_ranks_read_no_byte_twice_but_what_each_holds(
    split: Split, directories: dict[str, Path], reads: Reads
) -> None:
    checkpoint = Checkpoint.open(directories["quantized"])
    for rank in range(split.num_ranks):
        _load(checkpoint, Placement(split, rank))
    expected = {
        name: entry.num_bytes * _copies(name, split)
        for name, entry in checkpoint.entries.items()
        if not name.endswith(".input_scale")
    }
    assert dict(reads.num_bytes) == expected


@pytest.mark.parametrize("split", [Split(2, 2, 1), Split(4, 4, 1)], ids=str)
def test_an_expert_is_read_by_one_rank(split: Split, directories: dict[str, Path], reads: Reads) -> None:
    checkpoint, held = Checkpoint.open(directories["quantized"]), []
    for rank in range(split.num_ranks):
        reads.times.clear()
        _load(checkpoint, Placement(split, rank))
        held.append({int(m[1]) for name in reads.times if (m := re.search(r"\.experts\.(\d+)\.", name))})
    assert sorted(expert for experts in held for expert in experts) == list(range(7))
    assert all(held)
