"""What a model takes on a set of GPUs, and how fast it can decode: arithmetic, nothing is loaded.

    SplitPlan    weights on each rank, and the tokens of KV cache for which there is room beside them
    Plan         the splits of a GPU set, best first, and a Shortfall if none holds one request

How ranks divide the model is `Placement`'s to say; a draft layer is counted as one of the layers. The
embedding stands on the first stage, and on the last too where the head is tied to it or a draft layer needs
it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.errors import ConfigError, OptionError
from nybble.engine.planning.gpu_specs import MAX_GPUS, GpuSet
from nybble.engine.planning.inventory import (
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
from nybble.engine.planning.placement import Placement, Split, stage_layers
from nybble.engine.planning.shortfall import Shortfall
from nybble.engine.planning.splits import legal_splits, split_problem

PLANNED_KV_DTYPES: tuple[KVDtype, ...] = ("bf16", "fp8")
BATCHES = (1, 4, 8, 16, 32, 64, 128)
CONTEXTS = (4096, 32_768, 131_072)


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
class Plan:
    """`candidates` are best first: those that hold a longest request, the fastest for one request first.

    `kv_dtype` is that of the cache which a longest request is held in. Where the modelled speed is equal,
    more room comes first, then whole matrices before whole experts (EP 1): those are read evenly by all
    ranks, whichever experts a token picks.
    """

    inventory: Inventory
    gpus: GpuSet
    max_model_len: int
    kv_dtype: KVDtype
    candidates: tuple[SplitPlan, ...]
    shortfall: Shortfall | None

    @property
    def best(self) -> SplitPlan:
        return self.candidates[0]


def make_plan(
    inventory: Inventory,
    gpus: GpuSet,
    max_model_len: int | None = None,
    kv_dtype: KVDtype = "fp8",
    split: Split | None = None,
) -> Plan:
    """How `inventory` can be served on `gpus`; `max_model_len` defaults to the model's limit.

    Considers every split, or just the one given.

    Raises:
        OptionError: `max_model_len` is out of range, or the model cannot be split as given.
        ConfigError: a matrix is not made of whole blocks.
    """
    limit = inventory.config.max_position_embeddings
    length = limit if max_model_len is None else max_model_len
    if not 1 <= length <= limit:
        raise OptionError(f"max_model_len is {length}, expected 1 to the model's {limit} positions")
    if split is not None:
        problem = split_problem(inventory, split)
        if problem:
            raise OptionError(f"the model cannot be split as {split}: {problem}")
        splits = [split]
    else:
        splits = list(legal_splits(inventory, gpus.count))
    if not splits:
        raise ConfigError(f"config.json: {split_problem(inventory, Split(1, 1, 1))}")
    plan = Plan(inventory, gpus, length, kv_dtype, (), None)
    plans = (plan_split(inventory, split, gpus.gpu.usable_bytes) for split in splits)
    plan = replace(plan, candidates=tuple(sorted(plans, key=lambda p: _preference(p, plan))))
    return plan if _holds(plan.best, plan) else replace(plan, shortfall=_explain(plan))


def plan_split(inventory: Inventory, split: Split, usable_bytes: int) -> SplitPlan:
    """What `split` leaves for the KV cache on GPUs of `usable_bytes` memory."""
    stages = _stages(inventory, split)
    rooms = [usable_bytes - stage.rank_bytes for stage in stages]
    config = inventory.config
    max_tokens = {dtype: _max_tokens(config, split, stages, rooms, dtype) for dtype in KV_ITEM_BYTES}
    return SplitPlan(split, stages, split.tensor_parallel * sum(rooms), max_tokens)


def _max_tokens(
    config: ModelConfig, split: Split, stages: Sequence[Stage], rooms: Sequence[int], dtype: KVDtype
) -> int:
    sizes = (_kv_rank_bytes(config, split, stage.num_layers, dtype) for stage in stages)
    return max(0, min(room // size for room, size in zip(rooms, sizes, strict=True)))


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
            step_bytes += share * group.num_bytes / _ways(group, plan.split)
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
    for dtype, context, batch in itertools.product(PLANNED_KV_DTYPES, contexts, BATCHES):
        speed = None
        if batch * context <= plan.best.max_tokens[dtype]:
            bandwidth = plan.gpus.gpu.bandwidth_tbps
            speed = decode_ceiling(plan.best, plan.inventory, bandwidth, dtype, batch, context)
        yield Ceiling(dtype, context, batch, speed)


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
            rank_bytes=sum(_rank_bytes(group, inventory.config, split) for group in on_stage),
        )
        for index, on_stage in enumerate(groups)
    )


def _stages_of(group: Group, inventory: Inventory, num_stages: int) -> set[int]:
    """The stages that a group stands on."""
    last = num_stages - 1
    if group.row == DRAFT_COPIES:
        return set()
    if group.layer is not None:
        stages = range(num_stages)
        return {s for s in stages if group.layer in stage_layers(inventory.num_layers, s, num_stages)}
    if group.part != EMBEDDING:
        return {last}
    is_needed_last = inventory.config.tie_word_embeddings or inventory.has_draft
    return {0, last} if is_needed_last else {0}


def _ways(group: Group, split: Split) -> int:
    """Among how many ranks of its stage a group is divided."""
    return min(split.tensor_parallel, group.shard.num_units) if group.shard else 1


def _rank_bytes(group: Group, config: ModelConfig, split: Split) -> int:
    """Bytes of a group on the rank that holds most of it."""
    if group.part == EXPERTS and split.expert_parallel > 1:
        experts = len(Placement(split, split.tensor_parallel - 1).experts(config.n_routed_experts))
        return group.num_bytes * experts // config.n_routed_experts
    return -(-group.num_bytes // _ways(group, split))


def _kv_rank_bytes(config: ModelConfig, split: Split, num_layers: int, dtype: KVDtype) -> int:
    """Bytes of keys and values of one token in `num_layers` on a rank, which has at least one whole head."""
    heads = len(Placement(split).units(config.num_key_value_heads))
    return num_layers * kv_layer_bytes(config, heads, dtype)


def _holds(split_plan: SplitPlan, plan: Plan) -> bool:
    return split_plan.max_tokens[plan.kv_dtype] >= plan.max_model_len


def _preference(split_plan: SplitPlan, plan: Plan) -> tuple[float, ...]:
    """Smaller is better."""
    tokens, split = split_plan.max_tokens[plan.kv_dtype], split_plan.split
    if tokens == 0:
        return True, True, split_plan.rank_bytes, 0, split.expert_parallel
    bandwidth = plan.gpus.gpu.bandwidth_tbps
    speed = decode_ceiling(split_plan, plan.inventory, bandwidth, plan.kv_dtype, 1, 0)
    return not _holds(split_plan, plan), False, -speed, -tokens, split.expert_parallel


def _explain(plan: Plan) -> Shortfall:
    inventory, gpu = plan.inventory, plan.gpus.gpu
    needs = [(*_fullest(candidate, plan), candidate) for candidate in plan.candidates]
    weights, cache, nearest = min(needs, key=lambda need: need[0] + need[1])

    def is_enough(held: Inventory, count: int) -> bool:
        splits = (plan_split(held, split, gpu.usable_bytes) for split in legal_splits(held, count))
        return any(_holds(split_plan, plan) for split_plan in splits)

    # The first condition only saves the time of trying what is bound to fail.
    total = sum(group.num_bytes for group in inventory.main)
    counts = (n for n in range(plan.gpus.count + 1, MAX_GPUS + 1) if n * gpu.usable_bytes > total)
    more = (count for count in counts if is_enough(inventory, count))
    return Shortfall(
        split=nearest.split,
        weight_bytes=weights,
        cache_bytes=cache,
        gpus=plan.gpus,
        max_model_len=plan.max_model_len,
        kv_dtype=plan.kv_dtype,
        shorter_context=max(candidate.max_tokens[plan.kv_dtype] for candidate in plan.candidates),
        fits_without_draft=inventory.has_draft and is_enough(inventory.without_draft(), plan.gpus.count),
        num_gpus=next(more, None),
    )


def _fullest(split_plan: SplitPlan, plan: Plan) -> tuple[int, int]:
    """Bytes of weights, and of the cache of a longest request, on the rank that needs most."""

    def cache(stage: Stage) -> int:
        config = plan.inventory.config
        return plan.max_model_len * _kv_rank_bytes(config, split_plan.split, stage.num_layers, plan.kv_dtype)

    return max(((stage.rank_bytes, cache(stage)) for stage in split_plan.stages), key=sum)
