"""From options to a running engine: read, resolve, load."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from nybble.engine.backend import make_ops
from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.kv_scales import KVScales, read_kv_scales
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.checkpoint.quantization_config import read_quantization_config
from nybble.engine.checkpoint.verify_checkpoint import check_structure
from nybble.engine.checkpoint.vocabulary import count_token_ids
from nybble.engine.drafting.draft_model import DraftModel
from nybble.engine.drafting.draft_worker import DraftWorker
from nybble.engine.drafting.drafter import Drafter, ModelDrafter
from nybble.engine.drafting.speculator import Speculator
from nybble.engine.engine import Engine, EngineLimits
from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import OptionError
from nybble.engine.grammar.grammar_compiler import GrammarCompiler
from nybble.engine.hardware import Hardware, detect
from nybble.engine.messages import EngineReady
from nybble.engine.model.decode_graphs import Recorder, powers_of_two, record_cuda_graph
from nybble.engine.model.kv_cache import allocate_kv_cache
from nybble.engine.model.model import Glm4Moe
from nybble.engine.model.model_runner import ModelRunner
from nybble.engine.model.weights import load_weights
from nybble.engine.model.worker import Worker
from nybble.engine.planning.inventory import read_inventory
from nybble.engine.planning.placement import Placement
from nybble.engine.ranks.launched_rank import LaunchedRank
from nybble.engine.ranks.rank_group import RankGroup
from nybble.engine.resolution import MemoryPlan, resolve
from nybble.engine.sampling.sampler import Sampler
from nybble.engine.scheduling.block_pool import BlockPool
from nybble.engine.scheduling.scheduler import Scheduler
from nybble.kernels.cpu.cpu_ops import CpuOps
from nybble.kernels.ops import KVCacheLayer, Ops

_MOST_RECORDED = 8  # sequences of a step, on the CPU backend


@dataclass(frozen=True)
class Preparation:
    """What can be known of a rank before its weights are read. `config` is resolved."""

    config: EngineConfig
    placement: Placement
    hardware: Hardware
    model_config: ModelConfig
    checkpoint: Checkpoint
    memory: MemoryPlan
    limits: EngineLimits

    @property
    def fingerprint(self) -> str:
        """Equal on ranks that can work together: the same options and checkpoint, wherever it lies."""
        checkpoint = sorted((e.name, e.dtype, e.shape) for e in self.checkpoint.entries.values())
        # Stages have layers of their own, and machines cores.
        cache = replace(self.config.cache, kv_cache_memory=None)
        options = replace(self.config, checkpoint="", cache=cache, cpu_threads=None)
        fields = (options, self.model_config, checkpoint, self.limits.num_token_ids)
        return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()

    def with_num_blocks(self, num_blocks: int) -> Preparation:
        """With the size of cache that all ranks agreed on."""
        geometry = replace(self.memory.cache_geometry, num_blocks=num_blocks)
        return replace(self, memory=replace(self.memory, cache_geometry=geometry))

    def ready_message(self) -> EngineReady:
        return EngineReady(
            config=self.config,
            vocab_size=self.model_config.vocab_size,
            max_model_len=self.limits.max_model_len,
            eos_token_ids=self.model_config.eos_token_ids,
        )


def prepare(config: EngineConfig) -> Preparation:
    """Read config.json and the tensors' headers, and resolve the options for this rank.

    Raises:
        CheckpointError: the checkpoint is incomplete, malformed or of another architecture.
        OptionError: an option cannot be satisfied on this machine.
    """
    if config.null_step_ms is not None:
        raise OptionError("null_step_ms is for `nybble serve` on one rank only")
    directory = Path(config.checkpoint)
    model_config, checkpoint = check_structure(directory)
    launched = LaunchedRank.from_environment()
    placement = launched.place(config.parallel.split)
    hardware = detect(config.device, launched)
    inventory = read_inventory(model_config, checkpoint.entries)
    declared = read_quantization_config(directory)
    is_fp8_kv_declared = declared is not None and declared.has_fp8_kv_cache
    resolved, memory = resolve(config, inventory, placement, hardware, is_fp8_kv_declared)
    limits = EngineLimits(
        max_model_len=resolved.max_model_len or model_config.max_position_embeddings,
        num_token_ids=count_token_ids(directory, model_config.vocab_size),
        block_size=resolved.cache.block_size,
        block_lookahead=1 if resolved.speculation.num_speculative_tokens else 0,
        max_waiting=resolved.scheduler.max_waiting,
    )
    return Preparation(resolved, placement, hardware, model_config, checkpoint, memory, limits)


def load_worker(
    preparation: Preparation, group: RankGroup, on_layer: Callable[[int], None] = lambda layer: None
) -> Worker[Any]:
    """Load the rank's weights and allocate its KV cache; `on_layer` is told of each layer loaded.

    Raises:
        CheckpointError: a file cannot be read, or its numbers cannot be meant.
    """
    config, model_config = preparation.config, preparation.model_config
    device, ops = preparation.hardware.torch_device, make_ops(config, preparation.hardware)
    dtype = getattr(torch, config.dtype)
    weights = load_weights(
        preparation.checkpoint,
        model_config,
        ops,
        device,
        dtype,
        weight_dtypes=config.weights,
        placement=preparation.placement,
        on_layer=on_layer,
        with_draft=config.speculation.num_speculative_tokens > 0,
    )
    all_reduce = group.all_reduce_in_order if config.deterministic else group.all_reduce
    model = Glm4Moe(model_config, weights, ops, device, all_reduce)
    caches: Sequence[KVCacheLayer] = allocate_kv_cache(
        preparation.memory.cache_geometry, ops, device, _kv_scales(preparation)
    )
    draft_worker = None
    if weights.draft is not None:
        *caches, draft_cache = caches
        draft_model, limits = DraftModel(weights.draft, ops, model), preparation.limits
        draft_worker = DraftWorker(draft_model, draft_cache, group, limits.block_size, limits.num_token_ids)
    worker = Worker(model_config, model, tuple(caches), group, device, dtype, draft_worker)
    if not config.enforce_eager:
        max_blocks = -(-preparation.limits.max_model_len // preparation.limits.block_size)
        recorder = _recorder(ops, config.scheduler.max_num_seqs)
        worker.record_decode_graphs(recorder, max_blocks, config.speculation.num_speculative_tokens)
    return worker


def _recorder(ops: Ops[Any], max_num_seqs: int) -> Recorder:
    """On a CPU a larger batch takes so long that what Python needs does not count, and would fill memory."""
    if isinstance(ops, CpuOps):
        return Recorder(ops.record, range(1, min(max_num_seqs, _MOST_RECORDED) + 1), at_start=False)
    return Recorder(record_cuda_graph, powers_of_two(max_num_seqs), at_start=True)


def _kv_scales(preparation: Preparation) -> tuple[KVScales, ...]:
    """Of the rank's layers; none for a cache that has no use for them."""
    if preparation.config.cache.kv_cache_dtype != "fp8":
        return ()
    num_layers = preparation.model_config.num_hidden_layers
    layers = list(preparation.placement.layers(num_layers))
    if preparation.config.speculation.num_speculative_tokens:
        layers.append(num_layers)
    return read_kv_scales(preparation.checkpoint, layers)


def build_engine(
    preparation: Preparation, worker: Worker[Any], group: RankGroup, drafter: Drafter | None = None
) -> Engine:
    """Rank 0's engine around its worker. `drafter` takes the place of the checkpoint's draft layer."""
    config, geometry = preparation.config, preparation.memory.cache_geometry
    num_drafts = config.speculation.num_speculative_tokens
    sampler = Sampler(worker.ops, preparation.limits.num_token_ids)
    scheduler = Scheduler(
        config.scheduler,
        BlockPool(geometry.num_blocks),
        geometry.block_size,
        config.cache.enable_prefix_caching,
        num_drafts,
    )
    # A GPU computes by itself.
    thread = ThreadPoolExecutor(1, "step") if preparation.hardware.device == "cpu" else None
    runner = ModelRunner(worker, sampler, group, geometry.block_size, thread)
    speculator = None
    if num_drafts:
        drafter = drafter or ModelDrafter(worker, group, geometry.block_size, thread)
        speculator = Speculator(drafter, num_drafts, time.perf_counter)
    grammars = GrammarCompiler(Path(config.checkpoint))
    return Engine(runner, scheduler, preparation.limits, speculator=speculator, grammars=grammars)


def load_engine(preparation: Preparation, drafter: Drafter | None = None) -> Engine:
    """Load an engine of one rank, in this process. `drafter` takes the place of the draft layer."""
    group = RankGroup(preparation.placement)
    return build_engine(preparation, load_worker(preparation, group), group, drafter)
