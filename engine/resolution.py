"""The one resolution of every open option, against the model and the machine.

What `resolve` returns is logged and holds no more "auto" or None.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from nybble.engine.backend import (
    resolve_backend,
    resolve_cpu_threads,
    resolve_kv_cache_dtype,
    resolve_launch_table,
)
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import OptionError
from nybble.engine.hardware import Hardware
from nybble.engine.model.kv_cache import KV_TORCH_DTYPES, CacheGeometry
from nybble.engine.planning.capacity import make_plan
from nybble.engine.planning.gpu_specs import GIB, GpuSet
from nybble.engine.planning.inventory import EXPERTS, Group, Inventory, KVDtype
from nybble.engine.planning.placement import Placement

MAX_SPECULATIVE_TOKENS = 4
_CPU_CACHE_BYTES = 4 * GIB  # the most that is taken without being asked for


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Of one rank: bytes that the weights take as the backend holds them, and blocks of KV cache."""

    weight_bytes: int
    cache_geometry: CacheGeometry

    def __str__(self) -> str:
        cache = self.cache_geometry
        return (
            f"weights {self.weight_bytes / GIB:.2f} GiB; KV cache {cache.num_bytes / GIB:.2f} GiB, "
            f"{cache.num_blocks * cache.block_size} tokens"
        )


def resolve(
    config: EngineConfig,
    inventory: Inventory,
    placement: Placement,
    hardware: Hardware,
    is_fp8_kv_declared: bool = False,
) -> tuple[EngineConfig, MemoryPlan]:
    """Settle every open option for the rank at `placement`.

    is_fp8_kv_declared: whether the checkpoint wants its keys and values in FP8

    Raises:
        OptionError: an option is out of range, the model cannot be split so, or weights and cache do not
            fit in memory.
    """
    model = inventory.config
    _check_ranges(config, model)
    _check_speculation(config, inventory)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if hardware.device == "cpu" else "bfloat16"
    backend = resolve_backend(config, hardware)
    resolved = replace(
        config,
        backend=backend,
        enforce_eager=config.enforce_eager
        or not _can_record(backend, config.deterministic, inventory, placement, hardware),
        device=hardware.device,
        dtype=dtype,
        max_model_len=config.max_model_len or model.max_position_embeddings,
    )
    resolved = replace(
        resolved,
        cpu_threads=resolve_cpu_threads(resolved, hardware),
        launch_table=resolve_launch_table(resolved, hardware),
    )
    kv_dtype = resolve_kv_cache_dtype(resolved, hardware, is_fp8_kv_declared)
    memory = _plan_memory(resolved, kv_dtype, inventory, placement, hardware)
    gib = round(memory.cache_geometry.num_bytes / GIB, 3)
    return replace(
        resolved, cache=replace(config.cache, kv_cache_dtype=kv_dtype, kv_cache_memory=gib)
    ), memory


def _plan_memory(
    config: EngineConfig,
    kv_dtype: KVDtype,
    inventory: Inventory,
    placement: Placement,
    hardware: Hardware,
) -> MemoryPlan:
    """`nybble plan` for this machine, with the weights as the backend holds them."""
    max_model_len = config.max_model_len or 0
    gpus = GpuSet(placement.split.num_ranks, hardware.spec)
    has_draft = config.speculation.num_speculative_tokens > 0
    held = (inventory if has_draft else inventory.without_draft()).recast(config.weights)
    if config.backend == "reference":
        held = held.dequantized(item_bytes=4 if config.dtype == "float32" else 2)
    elif config.backend == "cpu":
        held = held.as_int8()
    else:
        _check_expert_kernels(held)
    plan = make_plan(held, gpus, max_model_len, kv_dtype, placement.split)
    if plan.shortfall is not None:
        raise OptionError(str(plan.shortfall))
    weight_bytes = plan.best.stages[placement.stage].rank_bytes
    geometry = CacheGeometry.of(
        inventory.config,
        placement,
        KV_TORCH_DTYPES[kv_dtype],
        config.cache.block_size,
        with_draft=has_draft,
    )
    cache_bytes = _cache_bytes(config, hardware, weight_bytes)
    geometry = replace(geometry, num_blocks=cache_bytes // geometry.block_bytes)
    _check_cache(geometry, max_model_len, weight_bytes, hardware)
    return MemoryPlan(weight_bytes=weight_bytes, cache_geometry=geometry)


def _can_record(
    backend: str, is_deterministic: bool, inventory: Inventory, placement: Placement, hardware: Hardware
) -> bool:
    """Whether the main model's decode steps can be recorded. Stages wait for each other on the host, and so
    do experts that have no kernel, and ranks on CPUs; in a CUDA graph a library may choose another
    product."""
    if backend == "cpu":
        return placement.split.num_ranks == 1
    is_one_stage = placement.is_first_stage and placement.is_last_stage
    has_kernels = all("FP4" in layout for layout in _expert_layouts(inventory.main))
    is_graph = backend == "triton" and hardware.device == "cuda" and not is_deterministic
    return is_graph and is_one_stage and has_kernels


def _expert_layouts(groups: Iterable[Group]) -> list[str]:
    return sorted({group.layout for group in groups if group.part == EXPERTS})


def _check_expert_kernels(inventory: Inventory) -> None:
    layouts = _expert_layouts(inventory.groups)
    if any("FP8" in layout for layout in layouts):
        raise OptionError(
            f"backend is 'triton', which has no kernels for experts in {', '.join(layouts)}: "
            "set backend to 'reference'"
        )


def _check_ranges(config: EngineConfig, model: ModelConfig) -> None:
    positive = {
        "block_size": config.cache.block_size,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
        "max_waiting": 1 if config.scheduler.max_waiting is None else config.scheduler.max_waiting,
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


def _check_speculation(config: EngineConfig, inventory: Inventory) -> None:
    count = config.speculation.num_speculative_tokens
    if not 0 <= count <= MAX_SPECULATIVE_TOKENS:
        raise OptionError(f"num_speculative_tokens is {count}, expected 0 (off) to {MAX_SPECULATIVE_TOKENS}")
    if not count:
        return
    num_layers = inventory.config.num_nextn_predict_layers
    if num_layers != 1 or not inventory.has_draft:
        found = f"num_nextn_predict_layers {num_layers}" if num_layers != 1 else "no tensors of it"
        raise OptionError(
            f"num_speculative_tokens is {count}, but drafting takes one MTP layer and the checkpoint has "
            f"{found}"
        )
    stages = config.parallel.pipeline_parallel_size
    if stages > 1:
        raise OptionError(
            f"num_speculative_tokens is {count}, but pipeline_parallel_size is {stages}: drafting takes all "
            "layers on one stage"
        )


def _cache_bytes(config: EngineConfig, hardware: Hardware, weight_bytes: int) -> int:
    if config.cache.kv_cache_memory is not None:
        return int(config.cache.kv_cache_memory * GIB)
    left = hardware.spec.usable_bytes - weight_bytes
    return min(left, _CPU_CACHE_BYTES) if hardware.device == "cpu" else left


def _check_cache(geometry: CacheGeometry, max_model_len: int, weight_bytes: int, hardware: Hardware) -> None:
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
