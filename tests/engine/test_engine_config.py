from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from nybble.engine.engine_config import (
    GIB,
    CacheConfig,
    EngineConfig,
    MemoryPlan,
    SchedulerConfig,
    resolve,
)
from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware
from nybble.engine.kv_cache import CacheGeometry
from nybble.engine.model_config import ModelConfig

GLM_4_7: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "glm-4.7-config.json").read_text())
# 2 * 4 layers * 2 KV heads * 64 = 1024 values a token.
MODEL = ModelConfig.from_fields(
    GLM_4_7
    | {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1000}
)
CPU, GPU = Hardware("cpu", 16 * GIB), Hardware("cuda", 80 * GIB)
CONFIG = EngineConfig(checkpoint="x")


def _resolve(
    config: EngineConfig = CONFIG, hardware: Hardware = CPU, num_parameters: int = 1000
) -> tuple[EngineConfig, MemoryPlan]:
    return resolve(config, MODEL, num_parameters, hardware)


def _with_cache(**options: Any) -> EngineConfig:
    return replace(CONFIG, cache=CacheConfig(**options))


def _with_scheduler(**options: Any) -> EngineConfig:
    return replace(CONFIG, scheduler=SchedulerConfig(**options))


def test_nothing_stays_open() -> None:
    resolved, _ = _resolve()
    values = {**asdict(resolved), **asdict(resolved.cache), **asdict(resolved.scheduler)}
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
    assert memory.cache_geometry.item_bytes == item_bytes


def test_the_cache_has_the_models_shape() -> None:
    _, memory = _resolve(_with_cache(block_size=32, kv_cache_memory=1.0))
    assert memory.cache_geometry == CacheGeometry(
        num_layers=4, num_kv_heads=2, head_dim=64, item_bytes=4, block_size=32, num_blocks=8192
    )


def test_the_cache_takes_what_is_left_of_a_gpu() -> None:
    _, memory = _resolve(hardware=GPU, num_parameters=10 * GIB)
    cache = memory.cache_geometry
    left = int(80 * GIB * 0.9) - 20 * GIB
    assert left - cache.block_bytes < cache.num_bytes <= left


@pytest.mark.parametrize(("free", "expected"), [(16, 4.0), (3, 2.7)])
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
    with pytest.raises(OptionError, match=r"weights need 20\.0 GiB .* only 16\.0 GiB of cpu memory are free"):
        _resolve(num_parameters=5 * GIB)


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


@pytest.mark.parametrize("kind", [CacheConfig, SchedulerConfig, EngineConfig])
def test_every_option_has_a_help_text(kind: type) -> None:
    helpless = [f.name for f in fields(kind) if not f.metadata.get("help")]
    assert helpless == (["weights", "cache", "scheduler"] if kind is EngineConfig else [])
