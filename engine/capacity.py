"""What a model takes on a set of GPUs, and how fast it can decode: arithmetic, nothing is loaded.

    Split        TP x PP ranks; EP divides the routed experts of a stage among groups of its TP ranks
    SplitPlan    weights on each rank, and the tokens of KV cache for which there is room beside them
    Plan         the splits of a GPU set, best first, and a Shortfall if none holds one request

Pipeline stages are runs of equally many layers, a draft layer counted as one. The embedding stands on the
first stage, and on the last too where the head is tied to it or a draft layer needs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nybble.engine.engine_config import GIB
from nybble.engine.errors import ConfigError, OptionError
from nybble.engine.gpu_specs import MAX_GPUS, GpuSet
from nybble.engine.inventory import (
    DRAFT_COPIES,
    EMBEDDING,
    EXPERTS,
    KV_ITEM_BYTES,
    Group,
    Inventory,
    KVDtype,
    kv_layer_bytes,
    read_share,
)
from nybble.engine.model_config import ModelConfig

WORKSPACE_BYTES = 4 * GIB  # of each GPU: activations, communication buffers, CUDA context and graphs

BATCHES = (1, 4, 8, 16, 32, 64, 128)
CONTEXTS = (4096, 32_768, 131_072)


@dataclass(frozen=True)
class Split:
    """Ranks = tensor_parallel x pipeline_parallel; `expert_parallel` divides tensor_parallel."""

    tensor_parallel: int
    expert_parallel: int
    pipeline_parallel: int

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def __str__(self) -> str:
        return f"TP {self.tensor_parallel}, EP {self.expert_parallel}, PP {self.pipeline_parallel}"


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: what stands on it, and the bytes of weights on each of its ranks."""

    is_last: bool
    groups: tuple[Group, ...]
    rank_bytes: int

    @property
    def num_layers(self) -> int:
        """Layers that keep keys and values."""
        return len({group.layer for group in self.groups if group.layer is not None})

    @property
    def num_main_layers(self) -> int:
        return len({group.layer for group in self.groups if group.layer is not None and not group.is_draft})


@dataclass(frozen=True)
class SplitPlan:
    """`kv_room_bytes`: left over on all ranks together, below 0 if a rank lacks more than others have.

    `max_tokens`: tokens of KV cache for which every rank has room; 0 if not even the weights fit.
    """

    split: Split
    stages: tuple[Stage, ...]
    kv_room_bytes: int
    max_tokens: Mapping[KVDtype, int]

    @property
    def rank_bytes(self) -> int:
        """Bytes of weights on the fullest rank."""
        return max(stage.rank_bytes for stage in self.stages)


@dataclass(frozen=True)
class Shortfall:
    """Why no split holds a request of `max_model_len` tokens with its KV cache in FP8, and what would.

    `split` is the one that comes nearest, of which the fullest rank needs `needed_bytes`, `weight_bytes` of
    them weights. Of the ways out, `shorter_context` is 0 and `num_gpus` None if there is none of the kind.
    """

    split: Split
    weight_bytes: int
    needed_bytes: int
    usable_bytes: int
    shorter_context: int
    fits_without_draft: bool
    num_gpus: int | None


@dataclass(frozen=True)
class Plan:
    """`candidates` are best first: those that hold a longest request, the fastest for one request first.

    Where the modelled speed is equal, more room comes first, then whole matrices before whole experts (EP 1):
    those are read evenly by all ranks, whichever experts a token picks.
    """

    inventory: Inventory
    gpus: GpuSet
    max_model_len: int
    candidates: tuple[SplitPlan, ...]
    shortfall: Shortfall | None

    @property
    def best(self) -> SplitPlan:
        return self.candidates[0]


def make_plan(inventory: Inventory, gpus: GpuSet, max_model_len: int | None = None) -> Plan:
    """How `inventory` can be served on `gpus`; `max_model_len` defaults to the model's limit.

    Raises:
        OptionError: `max_model_len` is out of range.
        ConfigError: a matrix is not made of whole blocks.
    """
    limit = inventory.config.max_position_embeddings
    length = limit if max_model_len is None else max_model_len
    if not 1 <= length <= limit:
        raise OptionError(f"max_model_len is {length}, expected 1 to the model's {limit} positions")
    candidates = sorted(
        _plan_splits(inventory, gpus), key=lambda plan: _preference(plan, inventory, gpus, length)
    )
    if not candidates:
        raise ConfigError(f"config.json: {split_problem(inventory, Split(1, 1, 1))}")
    shortfall = None if _holds(candidates[0], length) else _explain(inventory, gpus, length, candidates)
    return Plan(inventory, gpus, length, tuple(candidates), shortfall)


def plan_split(inventory: Inventory, split: Split, gpu_bytes: int) -> SplitPlan:
    """What `split` leaves for the KV cache on GPUs of `gpu_bytes` usable memory."""
    stages = _stages(inventory, split)
    rooms = [gpu_bytes - WORKSPACE_BYTES - stage.rank_bytes for stage in stages]
    config = inventory.config
    max_tokens = {dtype: _max_tokens(config, split, stages, rooms, dtype) for dtype in KV_ITEM_BYTES}
    return SplitPlan(split, stages, split.tensor_parallel * sum(rooms), max_tokens)


def _max_tokens(
    config: ModelConfig, split: Split, stages: Sequence[Stage], rooms: Sequence[int], dtype: KVDtype
) -> int:
    sizes = (_kv_rank_bytes(config, split, stage.num_layers, dtype) for stage in stages)
    return max(0, min(room // size for room, size in zip(rooms, sizes, strict=True)))


def split_problem(inventory: Inventory, split: Split) -> str | None:
    """Why the model cannot be split so; None if it can."""
    config, tp, ep = inventory.config, split.tensor_parallel, split.expert_parallel
    heads, kv_heads, experts = config.num_attention_heads, config.num_key_value_heads, config.n_routed_experts
    if heads % tp:
        return f"TP {tp} does not divide {heads} query heads"
    if kv_heads % tp and tp % kv_heads:
        return f"TP {tp} neither divides {kv_heads} KV heads nor is a multiple of them"
    if tp % ep or experts % ep:
        return f"EP {ep} does not divide TP {tp} and {experts} routed experts"
    if split.pipeline_parallel > inventory.num_layers:
        return f"PP {split.pipeline_parallel} exceeds {inventory.num_layers} layers"
    columns = {
        "attention": (heads * config.head_dim, tp),
        "dense MLP": (config.intermediate_size, tp),
        "shared experts": (config.shared_expert_size, tp),
        EXPERTS: (config.moe_intermediate_size, tp // ep),
    }
    for group in inventory.groups:
        width, ways = columns.get(group.part, (0, 1))
        if width % (ways * group.block_size):
            return f"{group.part}: {width} columns / {ways} are not whole blocks of {group.block_size}"
    return None


def decode_ceiling(
    plan: SplitPlan, inventory: Inventory, bandwidth_tbps: float, dtype: KVDtype, batch: int, context: int
) -> float:
    """Modelled tokens/s of `batch` sequences that hold `context` tokens each.

    A step takes as long as the ranks of each stage, one stage after the other, need to read their weights
    and keys and values once. Of the routed experts as many are read as tokens that choose independently and
    uniformly hit, evenly spread over ranks. Communication, arithmetic and launches take no time.
    """
    step_bytes = 0.0
    for stage in plan.stages:
        layers = stage.num_main_layers
        step_bytes += batch * context * _kv_rank_bytes(inventory.config, plan.split, layers, dtype)
        for group in stage.groups:
            share = read_share(group, inventory.config, batch, stage.is_last)
            step_bytes += share * group.num_bytes / _ways(group, inventory.config, plan.split)
    return batch * bandwidth_tbps * 1e12 / step_bytes


@dataclass(frozen=True)
class Ceiling:
    """Modelled decode speed, in tokens/s of all sequences together; None if their KV cache does not fit."""

    kv_dtype: KVDtype
    context: int
    batch: int
    tokens_per_second: float | None


def decode_ceilings(plan: Plan) -> Iterator[Ceiling]:
    """Decode ceilings of the best split, up to its longest context."""
    contexts = [context for context in CONTEXTS if context < plan.max_model_len] + [plan.max_model_len]
    for dtype, context, batch in itertools.product(KV_ITEM_BYTES, contexts, BATCHES):
        speed = None
        if batch * context <= plan.best.max_tokens[dtype]:
            bandwidth = plan.gpus.gpu.bandwidth_tbps
            speed = decode_ceiling(plan.best, plan.inventory, bandwidth, dtype, batch, context)
        yield Ceiling(dtype, context, batch, speed)


def _plan_splits(inventory: Inventory, gpus: GpuSet) -> Iterator[SplitPlan]:
    """Every legal split of as many of `gpus` as it can use, with EP either 1 or TP."""
    for tp in range(1, min(gpus.count, inventory.config.num_attention_heads) + 1):
        pp = min(gpus.count // tp, inventory.num_layers)
        for ep in sorted({1, tp}):
            split = Split(tp, ep, pp)
            if split_problem(inventory, split) is None:
                yield plan_split(inventory, split, int(gpus.gpu.memory_gib * GIB))


def _stages(inventory: Inventory, split: Split) -> tuple[Stage, ...]:
    num_stages = split.pipeline_parallel
    groups: list[list[Group]] = [[] for _ in range(num_stages)]
    for group in inventory.groups:
        for index in _stages_of(group, inventory, num_stages):
            groups[index].append(group)
    return tuple(
        Stage(
            is_last=index == num_stages - 1,
            groups=tuple(on_stage),
            rank_bytes=sum(-(-g.num_bytes // _ways(g, inventory.config, split)) for g in on_stage),
        )
        for index, on_stage in enumerate(groups)
    )


def _stages_of(group: Group, inventory: Inventory, num_stages: int) -> set[int]:
    """The stages that a group stands on."""
    last = num_stages - 1
    if group.row == DRAFT_COPIES:
        return set()
    if group.layer is not None:
        return {group.layer * num_stages // inventory.num_layers}
    if group.part != EMBEDDING:
        return {last}
    is_needed_last = inventory.config.tie_word_embeddings or inventory.has_draft
    return {0, last} if is_needed_last else {0}


def _ways(group: Group, config: ModelConfig, split: Split) -> int:
    """Among how many ranks of its stage a group is divided."""
    tp = split.tensor_parallel
    return {"none": 1, "all": tp, "KV heads": min(tp, config.num_key_value_heads)}[group.divided_among]


def _kv_rank_bytes(config: ModelConfig, split: Split, num_layers: int, dtype: KVDtype) -> int:
    """Bytes of keys and values of one token in `num_layers` on a rank, which has at least one whole head."""
    heads = -(-config.num_key_value_heads // split.tensor_parallel)
    return num_layers * kv_layer_bytes(config, heads, dtype)


def _holds(plan: SplitPlan, max_model_len: int) -> bool:
    return plan.max_tokens["fp8"] >= max_model_len


def _preference(plan: SplitPlan, inventory: Inventory, gpus: GpuSet, max_model_len: int) -> tuple[float, ...]:
    """Smaller is better."""
    tokens = plan.max_tokens["fp8"]
    if tokens == 0:
        return True, True, plan.rank_bytes, 0, plan.split.expert_parallel
    speed = decode_ceiling(plan, inventory, gpus.gpu.bandwidth_tbps, "fp8", 1, 0)
    return not _holds(plan, max_model_len), False, -speed, -tokens, plan.split.expert_parallel


def _explain(inventory: Inventory, gpus: GpuSet, length: int, candidates: Sequence[SplitPlan]) -> Shortfall:
    needs = [(*_fullest(inventory, plan, length), plan) for plan in candidates]
    needed, weights, nearest = min(needs, key=lambda need: need[0])

    def is_enough(held: Inventory, count: int) -> bool:
        return any(_holds(plan, length) for plan in _plan_splits(held, replace(gpus, count=count)))

    # The first condition only saves the time of trying what is bound to fail.
    spare = int(gpus.gpu.memory_gib * GIB) - WORKSPACE_BYTES
    total = sum(group.num_bytes for group in inventory.main)
    counts = (count for count in range(gpus.count + 1, MAX_GPUS + 1) if count * spare > total)
    more = (count for count in counts if is_enough(inventory, count))
    return Shortfall(
        split=nearest.split,
        weight_bytes=weights,
        needed_bytes=needed,
        usable_bytes=int(gpus.gpu.memory_gib * GIB),
        shorter_context=max(plan.max_tokens["fp8"] for plan in candidates),
        fits_without_draft=inventory.has_draft and is_enough(inventory.without_draft(), gpus.count),
        num_gpus=next(more, None),
    )


def _fullest(inventory: Inventory, plan: SplitPlan, length: int) -> tuple[int, int]:
    """Bytes that the fullest rank needs for a request of `length` tokens, and those of its weights."""

    def need(stage: Stage) -> int:
        cache = length * _kv_rank_bytes(inventory.config, plan.split, stage.num_layers, "fp8")
        return stage.rank_bytes + WORKSPACE_BYTES + cache

    fullest = max(plan.stages, key=need)
    return need(fullest), fullest.rank_bytes
