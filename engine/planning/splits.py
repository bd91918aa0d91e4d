"""Which ways there are to split a model."""

from __future__ import annotations

from collections.abc import Iterator

from nybble.engine.planning.inventory import EXPERTS, Inventory
from nybble.engine.planning.placement import Split


def legal_splits(inventory: Inventory, num_gpus: int) -> Iterator[Split]:
    """Every legal split of as many GPUs as it can use, with EP either 1 or TP."""
    for tp in range(1, min(num_gpus, inventory.config.num_attention_heads) + 1):
        pp = min(num_gpus // tp, inventory.num_layers)
        for ep in sorted({1, tp}):
            split = Split(tp, ep, pp)
            if split_problem(inventory, split) is None:
                yield split


def split_problem(inventory: Inventory, split: Split) -> str | None:
    """Why the model cannot be split so; None if it can."""
    config, tp, ep = inventory.config, split.tensor_parallel, split.expert_parallel
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % tp:
        return f"TP {tp} does not divide {heads} query heads"
    if kv_heads % tp and tp % kv_heads:
        return f"TP {tp} neither divides {kv_heads} KV heads nor is a multiple of them"
    if config.vocab_size % tp:
        return f"TP {tp} does not divide a vocabulary of {config.vocab_size}"
    if ep not in (1, tp):
        return f"EP {ep} is neither 1 nor TP {tp}"
    if ep > config.n_routed_experts:
        return f"EP {ep} exceeds {config.n_routed_experts} routed experts"
    if split.pipeline_parallel > inventory.num_layers:
        return f"PP {split.pipeline_parallel} exceeds {inventory.num_layers} layers"
    for group in inventory.groups:
        ways = 1 if group.part == EXPERTS and ep > 1 else tp
        if group.num_columns % (ways * group.block_size):
            columns, block = group.num_columns, group.block_size
            return f"{group.part}: {columns} columns / {ways} are not whole blocks of {block}"
    return None
