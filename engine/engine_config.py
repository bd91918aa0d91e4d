"""Options of the engine, and their one resolution against the model and the machine.

Fields that default to None or "auto" are settled once by `resolve`; what it returns is logged and
holds no more of either. Option names are vLLM's where the meaning is the same. A field's metadata is
its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware
from nybble.engine.kv_cache import CacheGeometry
from nybble.engine.model_config import ModelConfig
from nybble.engine.weight_dtypes import WeightDtypes

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    block_size: int = field(default=16, metadata={"help": "tokens in a KV-cache block"})
    kv_cache_memory: float | None = field(
        default=None, metadata={"help": "GiB of KV cache (default: what is left, at most 4 on a CPU)"}
    )
    enable_prefix_caching: bool = field(
        default=True, metadata={"help": "reuse the KV cache of equal prompt prefixes"}
    )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    max_num_seqs: int = field(default=64, metadata={"help": "requests that run at once"})
    max_num_batched_tokens: int = field(
        default=1024, metadata={"help": "tokens in one step; a longer prompt is prefilled in chunks"}
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    checkpoint: str = field(metadata={"help": "checkpoint directory"})
    backend: Literal["reference"] = field(
        default="reference", metadata={"help": "implementation of the model's operations"}
    )
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "where to compute (auto: a GPU if there is one)"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "activations (auto: float32 on a CPU, else bfloat16)"}
    )
    max_model_len: int | None = field(
        default=None, metadata={"help": "longest prompt plus answer (default: the model's limit)"}
    )
    weights: WeightDtypes = field(default_factory=WeightDtypes)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that the weights take as the backend holds them, and blocks of KV cache."""

    weight_bytes: int
    cache_geometry: CacheGeometry

    def __str__(self) -> str:
        cache = self.cache_geometry
        return (
            f"weights {self.weight_bytes / GIB:.2f} GiB; KV cache {cache.num_bytes / GIB:.2f} GiB, "
            f"{cache.num_blocks * cache.block_size} tokens"
        )


def resolve(
    config: EngineConfig, model: ModelConfig, num_parameters: int, hardware: Hardware
) -> tuple[EngineConfig, MemoryPlan]:
    """Settle every open option; `num_parameters` are held at the activation dtype's width.

    Raises:
        OptionError: an option is out of range, or weights and cache do not fit in memory.
    """
    _check_ranges(config, model)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if hardware.device == "cpu" else "bfloat16"
    item_bytes = 4 if dtype == "float32" else 2
    max_model_len = config.max_model_len or model.max_position_embeddings
    weight_bytes = num_parameters * item_bytes
    geometry = CacheGeometry.of(model, item_bytes, config.cache.block_size, num_blocks=0)
    cache_bytes = _cache_bytes(config, hardware, weight_bytes)
    geometry = replace(geometry, num_blocks=max(0, cache_bytes // geometry.block_bytes))
    _check_fits(geometry, max_model_len, weight_bytes, hardware)
    resolved = replace(
        config,
        device=hardware.device,
        dtype=dtype,
        max_model_len=max_model_len,
        cache=replace(config.cache, kv_cache_memory=round(geometry.num_bytes / GIB, 3)),
    )
    return resolved, MemoryPlan(weight_bytes=weight_bytes, cache_geometry=geometry)


def _check_ranges(config: EngineConfig, model: ModelConfig) -> None:
    positive = {
        "block_size": config.cache.block_size,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
        "max_model_len": 1 if config.max_model_len is None else config.max_model_len,
    }
    for name, value in positive.items():
        if value < 1:
            raise OptionError(f"{name} is {value}, expected at least 1")
    memory = config.cache.kv_cache_memory
    if memory is not None and not 0 < memory < 1 << 20:  # NaN fails this too
        raise OptionError(f"kv_cache_memory is {memory}, expected GiB above 0")
    if config.max_model_len and config.max_model_len > model.max_position_embeddings:
        raise OptionError(
            f"max_model_len is {config.max_model_len}, but the model was trained for at most "
            f"{model.max_position_embeddings} positions"
        )
    if config.scheduler.max_num_batched_tokens < config.scheduler.max_num_seqs:
        raise OptionError(
            f"max_num_batched_tokens is {config.scheduler.max_num_batched_tokens}, expected at "
            f"least max_num_seqs = {config.scheduler.max_num_seqs}, one token for each request"
        )


def _cache_bytes(config: EngineConfig, hardware: Hardware, weight_bytes: int) -> int:
    if config.cache.kv_cache_memory is not None:
        return int(config.cache.kv_cache_memory * GIB)
    left = int(hardware.free_bytes * 0.9) - weight_bytes
    return min(left, 4 * GIB) if hardware.device == "cpu" else left


def _check_fits(geometry: CacheGeometry, max_model_len: int, weight_bytes: int, hardware: Hardware) -> None:
    if weight_bytes + geometry.num_bytes > hardware.free_bytes:
        raise OptionError(
            f"weights need {weight_bytes / GIB:.1f} GiB and the KV cache "
            f"{geometry.num_bytes / GIB:.1f} GiB, but only {hardware.free_bytes / GIB:.1f} GiB of "
            f"{hardware.device} memory are free"
        )
    capacity = geometry.num_blocks * geometry.block_size
    if capacity < max_model_len:
        needed = geometry.block_bytes * -(-max_model_len // geometry.block_size)
        raise OptionError(
            f"a request of max_model_len = {max_model_len} tokens needs a KV cache of "
            f"{needed / GIB:.2f} GiB, but it has {geometry.num_bytes / GIB:.2f} GiB "
            f"({capacity} tokens): lower max_model_len or raise kv_cache_memory"
        )
