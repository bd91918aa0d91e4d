from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.parameters import Shard
from nybble.engine.engine_config import (
    CacheConfig,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware
from nybble.engine.model.kv_cache import CacheGeometry
from nybble.engine.planning.gpu_specs import GIB
from nybble.engine.planning.inventory import EMBEDDING, EXPERTS, HEAD, Group, Inventory
from nybble.engine.planning.placement import Placement, Split
from nybble.engine.resolution import MemoryPlan, resolve

GLM_4_7: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "glm-4.7-config.json").read_text())
# 2 * 4 layers * 2 KV heads * 64 = 1024 values a token.
MODEL = ModelConfig.from_fields(
    GLM_4_7
    | {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1000}
)
CPU, GPU = Hardware("cpu", 16 * GIB), Hardware("cuda", 80 * GIB)
CONFIG = EngineConfig(checkpoint="x", backend="reference")


def _inventory(num_parameters: int) -> Inventory:
    """As many parameters, in four equal layers, of which each rank holds all. Bytes do not matter here."""
    group = Group(0, False, "dense MLP", None, num_parameters=num_parameters // 4)
    return Inventory(MODEL, tuple(replace(group, layer=layer) for layer in range(4)))


def _resolve(
    config: EngineConfig = CONFIG, hardware: Hardware = CPU, num_parameters: int = 1000
) -> tuple[EngineConfig, MemoryPlan]:
    return resolve(config, _inventory(num_parameters), Placement(), hardware)


def _with_cache(**options: Any) -> EngineConfig:
    return replace(CONFIG, cache=CacheConfig(**options))


def _with_scheduler(**options: Any) -> EngineConfig:
    return replace(CONFIG, scheduler=SchedulerConfig(**options))


def test_nothing_stays_open() -> None:
    resolved, _ = _resolve()
    values = {**asdict(resolved), **asdict(resolved.cache), **asdict(resolved.scheduler)}
    del values["null_step_ms"]  # None means a real model, and is nothing to settle
    del values["cpu_threads"]  # is of another backend
    assert not {name for name, value in values.items() if value in (None, "auto")}


def test_what_is_settled_stays() -> None:
    resolved, memory = _resolve()
    again, same_memory = _resolve(resolved)
    assert again == resolved
    assert same_memory == memory


def test_the_input_is_not_changed() -> None:
    before = asdict(CONFIG)
    _resolve()
    assert asdict(CONFIG) == before


@pytest.mark.parametrize(
    ("hardware", "asked", "expected", "item_bytes"),
    [
        (CPU, "auto", "float32", 4),
        (GPU, "auto", "bfloat16", 2),
        (CPU, "bfloat16", "bfloat16", 2),
        (GPU, "float32", "float32", 4),
    ],
)
def test_dtype(hardware: Hardware, asked: Any, expected: str, item_bytes: int) -> None:
    resolved, memory = _resolve(replace(CONFIG, dtype=asked), hardware)
    assert (resolved.dtype, resolved.device) == (expected, hardware.device)
    assert memory.weight_bytes == 1000 * item_bytes
    assert memory.cache_geometry.dtype.itemsize == item_bytes
    assert resolved.cache.kv_cache_dtype == {4: "fp32", 2: "bf16"}[item_bytes]


def test_native_code_takes_the_cores_and_holds_int8() -> None:
    resolved, memory = _resolve(replace(CONFIG, backend="auto"), replace(CPU, num_cores=3), 1600)
    assert (resolved.backend, resolved.cpu_threads, resolved.dtype) == ("cpu", 3, "float32")
    assert memory.weight_bytes == 1600 + 1600 // 16
    assert _resolve(resolved, CPU, 1600) == (resolved, memory)


@pytest.mark.parametrize(("asked", "item_bytes"), [("fp32", 4), ("bf16", 2), ("fp8", 1)])
def test_the_cache_dtype_that_is_asked_for_is_planned(asked: Any, item_bytes: int) -> None:
    resolved, memory = _resolve(_with_cache(kv_cache_dtype=asked, kv_cache_memory=1.0))
    assert (resolved.cache.kv_cache_dtype, resolved.dtype) == (asked, "float32")
    assert memory.cache_geometry.num_blocks == GIB // (16 * 1024 * item_bytes)
    assert memory.weight_bytes == 4000


def test_a_long_context_fits_in_fp8_that_does_not_in_bf16() -> None:
    memory = 1000 * 1024 * 1.5 / GIB
    with pytest.raises(OptionError, match=r"lower max_model_len or raise kv_cache_memory"):
        _resolve(_with_cache(kv_cache_dtype="bf16", kv_cache_memory=memory))
    assert _resolve(_with_cache(kv_cache_dtype="fp8", kv_cache_memory=memory))[0].max_model_len == 1000


def test_the_cache_has_the_models_shape() -> None:
    _, memory = _resolve(_with_cache(block_size=32, kv_cache_memory=1.0))
    assert memory.cache_geometry == CacheGeometry(
        num_layers=4, num_kv_heads=2, head_dim=64, dtype=torch.float32, block_size=32, num_blocks=8192
    )


def test_the_cache_takes_what_is_left_of_a_gpu() -> None:
    _, memory = _resolve(hardware=GPU, num_parameters=10 * GIB)
    cache = memory.cache_geometry
    left = 80 * GIB - 4 * GIB - 20 * GIB
    assert left - cache.block_bytes < cache.num_bytes <= left


@pytest.mark.parametrize(("free", "expected"), [(16, 4.0), (3, 2.0)])
def test_the_cache_takes_at_most_4_gib_of_a_host(free: int, expected: float) -> None:
    resolved, memory = _resolve(hardware=Hardware("cpu", free * GIB))
    assert memory.cache_geometry.num_bytes / GIB == pytest.approx(expected, abs=1e-3)
    assert resolved.cache.kv_cache_memory == pytest.approx(expected, abs=1e-3)


def test_cache_memory_that_is_asked_for_is_whole_blocks() -> None:
    block_gib = 16 * 4096 / GIB
    _, memory = _resolve(_with_cache(kv_cache_memory=100.5 * block_gib))
    assert memory.cache_geometry.num_blocks == 100


def test_max_model_len_is_the_models_unless_told() -> None:
    assert _resolve()[0].max_model_len == 1000
    assert _resolve(replace(CONFIG, max_model_len=17))[0].max_model_len == 17
    assert _resolve(replace(CONFIG, max_model_len=1000))[0].max_model_len == 1000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_with_cache(block_size=0), "block_size is 0, expected at least 1"),
        (_with_scheduler(max_num_seqs=0), "max_num_seqs is 0, expected at least 1"),
        (_with_scheduler(max_num_batched_tokens=-1), "max_num_batched_tokens is -1"),
        (replace(CONFIG, max_model_len=-5), "max_model_len is -5"),
        (replace(CONFIG, max_model_len=1001), "max_model_len is 1001, .* at most 1000 positions"),
        (
            _with_scheduler(max_num_seqs=9, max_num_batched_tokens=8),
            "max_num_batched_tokens is 8, expected at least max_num_seqs = 9",
        ),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(config: EngineConfig, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        _resolve(config)


def test_limits_of_the_scheduler_are_allowed() -> None:
    _resolve(_with_scheduler(max_num_seqs=8, max_num_batched_tokens=8))
    _resolve(_with_scheduler(max_num_seqs=1, max_num_batched_tokens=1))


def test_weights_that_do_not_fit_are_refused_with_figures() -> None:
    """1,000 tokens take 4 MB: less than the 0.05 GiB that would show."""
    with pytest.raises(OptionError) as caught:
        _resolve(num_parameters=5 * GIB)
    assert str(caught.value) == (
        "1 x CPU with 16.0 GiB free: does not fit: as TP 1, EP 1, PP 1 a CPU needs 21.0 GiB (20.0 weights, "
        "1.0 workspace, 0.0 fp32 KV cache for one request of 1,000 tokens) and has 16.0. "
        "Smallest change first: 2 x CPU with 16.0 GiB free; or CPUs with 22 GiB usable."
    )


def test_a_shorter_context_is_the_smallest_change() -> None:
    """There is room for 500.5 tokens of 2,048 bytes."""
    hardware = Hardware("cuda", 10 * GIB + 500 * 2048 + 1024, "GPU")
    config = replace(CONFIG, max_model_len=501, cache=CacheConfig(block_size=1))
    with pytest.raises(OptionError, match="first: a context of at most 500 tokens; or 2 x GPU; or GPUs with"):
        _resolve(config, hardware, 3 * GIB)
    _, memory = _resolve(replace(config, max_model_len=500), hardware, 3 * GIB)
    assert memory.cache_geometry.num_blocks == 500


def test_a_cache_that_does_not_fit_is_refused_with_figures() -> None:
    with pytest.raises(OptionError, match=r"the KV cache 17\.0 GiB, but only 16\.0 GiB"):
        _resolve(_with_cache(kv_cache_memory=17.0))


@pytest.mark.parametrize(("num_blocks", "fits"), [(63, True), (62, False)])
def test_the_cache_must_hold_one_longest_request(num_blocks: int, fits: bool) -> None:
    """1000 tokens are 62.5 blocks of 16."""
    config = _with_cache(kv_cache_memory=num_blocks * 16 * 4096 / GIB)
    if fits:
        assert _resolve(config)[1].cache_geometry.num_blocks == num_blocks
        return
    with pytest.raises(OptionError, match=r"max_model_len = 1000 tokens .* \(992 tokens\)"):
        _resolve(config)


def test_a_shorter_context_needs_less_cache() -> None:
    config = _with_cache(kv_cache_memory=16 * 4096 / GIB)
    assert _resolve(replace(config, max_model_len=16))[1].cache_geometry.num_blocks == 1
    with pytest.raises(OptionError, match="max_model_len = 17"):
        _resolve(replace(config, max_model_len=17))


@pytest.mark.parametrize("memory", [0.0, -1.0])
def test_no_cache_at_all_is_refused(memory: float) -> None:
    with pytest.raises(OptionError, match="kv_cache_memory"):
        _resolve(_with_cache(kv_cache_memory=memory))


def test_the_plan_reads_well() -> None:
    _, memory = _resolve(_with_cache(kv_cache_memory=0.5), num_parameters=GIB // 4)
    assert str(memory) == "weights 1.00 GiB; KV cache 0.50 GiB, 131072 tokens"


# Ranks.


def _groups() -> Iterator[Group]:
    """Layers 0 and 1 have a dense MLP, 2 and 3 five experts; numbers of parameters that tell them apart."""
    by_id, by_neuron = Shard(0, MODEL.vocab_size), Shard(1, 400)
    yield Group(None, False, EMBEDDING, by_id, num_parameters=40_000)
    for layer in range(4):
        yield Group(layer, False, "norms", None, num_parameters=7)
        yield Group(layer, False, "attention", Shard(0, 2), num_parameters=600)
        part, size = ("dense MLP", 8_000) if layer < 2 else (EXPERTS, 5 * 800)
        yield Group(layer, False, part, by_neuron, num_columns=400, num_parameters=size)
    yield Group(None, False, "norms", None, num_parameters=3)
    yield Group(None, False, HEAD, by_id, num_parameters=44_000)


@pytest.mark.parametrize(
    ("split", "rank", "num_parameters", "num_layers", "num_kv_heads"),
    [
        (Split(1, 1, 1), 0, 40_000 + 2 * 8_607 + 2 * 4_607 + 44_003, 4, 2),
        (Split(2, 1, 1), 1, 20_000 + 2 * 4_307 + 2 * 2_307 + 22_003, 4, 1),
        # Two ranks of four hold each KV head.
        (Split(4, 1, 1), 3, 10_000 + 2 * (2_000 + 307) + 2 * (1_000 + 307) + 11_003, 4, 1),
        # Two of five experts on one rank and three on the other: what the fuller one holds.
        (Split(2, 2, 1), 0, 20_000 + 2 * 4_307 + 2 * (2_400 + 307) + 22_003, 4, 1),
        (Split(1, 1, 3), 0, 40_000 + 2 * 8_607, 2, 2),
        (Split(1, 1, 3), 1, 4_607, 1, 2),
        (Split(1, 1, 3), 2, 4_607 + 44_003, 1, 2),
        (Split(2, 1, 2), 1, 20_000 + 2 * 4_307, 2, 1),
        (Split(2, 1, 2), 2, 2 * 2_307 + 22_003, 2, 1),
    ],
    ids=str,
)
def test_memory_of_a_rank(
    split: Split, rank: int, num_parameters: int, num_layers: int, num_kv_heads: int
) -> None:
    model = replace(MODEL, n_routed_experts=5)
    inventory = Inventory(model, tuple(_groups()))
    _, memory = resolve(CONFIG, inventory, Placement(split, rank), CPU)
    assert memory.weight_bytes == 4 * num_parameters
    geometry = memory.cache_geometry
    assert (geometry.num_layers, geometry.num_kv_heads) == (num_layers, num_kv_heads)
    assert geometry.block_bytes == 16 * 2 * num_layers * num_kv_heads * 64 * 4


def test_a_refusal_counts_the_ranks() -> None:
    """Two stages hold 20 GiB each of a model of 40; three hold 20, 10 and 10."""
    with pytest.raises(OptionError, match=r"^2 x CPU .*: as TP 1, EP 1, PP 2 .* first: 4 x CPU "):
        resolve(CONFIG, _inventory(10 * GIB), Placement(Split(1, 1, 2), 1), CPU)


def test_more_stages_make_room_for_what_one_does_not_hold() -> None:
    for rank in range(2):
        _, memory = resolve(CONFIG, _inventory(5 * GIB), Placement(Split(1, 1, 2), rank), CPU)
        assert memory.weight_bytes == 10 * GIB


def test_draft_layers_are_not_held() -> None:
    inventory = _inventory(1000)
    draft = Group(4, True, "attention", None, num_parameters=5 * GIB)
    _, memory = resolve(CONFIG, replace(inventory, groups=(*inventory.groups, draft)), Placement(), CPU)
    assert memory.weight_bytes == 4000


def _drafting(
    num_drafts: int, num_layers: int = 1, has_tensors: bool = True
) -> tuple[EngineConfig, Inventory]:
    inventory = _inventory(1000)
    draft = Group(4, True, "attention", None, num_parameters=500) if has_tensors else None
    model = replace(inventory.config, num_nextn_predict_layers=num_layers)
    groups = (*inventory.groups, draft) if draft else inventory.groups
    speculation = SpeculationConfig(num_speculative_tokens=num_drafts)
    return replace(CONFIG, speculation=speculation), replace(inventory, config=model, groups=groups)


def test_a_draft_layer_that_is_used_is_counted() -> None:
    (plain, _), (config, inventory) = _drafting(0), _drafting(2)
    _, without = resolve(plain, inventory, Placement(), CPU)
    _, memory = resolve(config, inventory, Placement(), CPU)
    assert (without.weight_bytes, memory.weight_bytes) == (4000, 6000)
    assert memory.cache_geometry.num_layers == without.cache_geometry.num_layers + 1


@pytest.mark.parametrize(
    ("num_drafts", "num_layers", "has_tensors", "message"),
    [
        (5, 1, True, "num_speculative_tokens is 5, expected 0 (off) to 4"),
        (-1, 1, True, "num_speculative_tokens is -1, expected 0 (off) to 4"),
        (1, 0, False, "drafting takes one MTP layer and the checkpoint has num_nextn_predict_layers 0"),
        (1, 2, True, "drafting takes one MTP layer and the checkpoint has num_nextn_predict_layers 2"),
        (1, 1, False, "drafting takes one MTP layer and the checkpoint has no tensors of it"),
    ],
)
def test_drafts_that_cannot_be_are_refused(
    num_drafts: int, num_layers: int, has_tensors: bool, message: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        resolve(*_drafting(num_drafts, num_layers, has_tensors), Placement(), CPU)


def test_drafts_over_pipeline_stages_are_refused() -> None:
    config, inventory = _drafting(1)
    config = replace(config, parallel=ParallelConfig(pipeline_parallel_size=2))
    with pytest.raises(
        OptionError, match="pipeline_parallel_size is 2: drafting takes all layers on one stage"
    ):
        resolve(config, inventory, Placement(Split(1, 1, 2)), CPU)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(5, 1, 1), "as TP 5, EP 1, PP 1: TP 5 does not divide 96 query heads"),
        (Split(3, 1, 1), "as TP 3, EP 1, PP 1: TP 3 neither divides 2 KV heads"),
        (Split(1, 1, 5), "as TP 1, EP 1, PP 5: PP 5 exceeds 4 layers"),
    ],
    ids=str,
)
def test_splits_that_cannot_be_are_refused(split: Split, message: str) -> None:
    with pytest.raises(OptionError, match=f"the model cannot be split {message}"):
        resolve(CONFIG, _inventory(1000), Placement(split, 0), CPU)


def test_deterministic_steps_are_no_graphs() -> None:
    assert _resolve(replace(CONFIG, deterministic=True))[0].enforce_eager


def test_the_cpu_backend_repeats_its_operations_also_if_deterministic() -> None:
    """They are the same ones; several ranks wait for each other between theirs."""
    config = replace(CONFIG, backend="cpu", deterministic=True)
    assert not _resolve(config)[0].enforce_eager
    assert _resolve(replace(config, enforce_eager=True))[0].enforce_eager
    assert resolve(config, _inventory(1000), Placement(Split(2, 1, 1), 0), CPU)[0].enforce_eager
