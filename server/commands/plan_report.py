"""`nybble plan`: a capacity plan as tables or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from nybble.engine.checkpoint.checkpoint import Checkpoint
from nybble.engine.checkpoint.model_config import ModelConfig, read_json_object
from nybble.engine.checkpoint.parameters import check_tensors
from nybble.engine.planning.capacity import (
    BATCHES,
    PLANNED_KV_DTYPES,
    Ceiling,
    Plan,
    SplitPlan,
    decode_ceiling,
    decode_ceilings,
    make_plan,
)
from nybble.engine.planning.gpu_specs import GIB, GpuSet, GpuSpec, format_gib
from nybble.engine.planning.inventory import (
    Inventory,
    KVDtype,
    PartSize,
    assume_inventory,
    read_inventory,
)
from nybble.engine.planning.shortfall import Shortfall

MEMORY_MODEL = (
    "memory (modelled): each GPU holds its share of the weights as they are stored and "
    f"{GpuSpec.workspace_gib} GiB of workspace; the rest is KV cache"
)
DECODE_MODEL = (
    "tokens/s (modelled: an upper bound, not measured): a step reads weights and KV cache once at peak "
    "memory bandwidth, pipeline stages in turn; B tokens hit E(1 - (1 - k/E)^B) of E experts a layer, spread "
    "evenly; communication, arithmetic and launches take no time; no speculative decoding"
)
_WIDTH = 110  # where the output is not a terminal, whose width would be taken


def print_plan(
    path: Path,
    gpus: GpuSet,
    out: TextIO,
    *,
    as_json: bool = False,
    max_model_len: int | None = None,
    with_draft: bool = True,
) -> None:
    """Plan for a checkpoint directory or a bare config.json, and print what comes out.

    Raises:
        CheckpointError: `path` is neither, or is not a model that can be served.
        OptionError: `max_model_len` is out of range.
    """
    inventory = read_model(path)
    plan = make_plan(inventory if with_draft else inventory.without_draft(), gpus, max_model_len)
    if as_json:
        print(json.dumps(plan_fields(plan), indent=2), file=out)
        return
    console = Console(file=out, width=None if out.isatty() else _WIDTH, highlight=False)
    for renderable in _report(plan):
        console.print(renderable, soft_wrap=isinstance(renderable, str))  # tables fit the width, lines do not


def read_model(path: Path) -> Inventory:
    """What stands in a checkpoint directory, or what a config.json lets one expect.

    Raises:
        CheckpointError: `path` is neither, or is not a model that can be served.
    """
    if path.is_dir():
        config = ModelConfig.from_directory(path)
        entries = Checkpoint.open(path).entries
        check_tensors(config, entries)
        return read_inventory(config, entries)
    fields = read_json_object(path)
    return assume_inventory(ModelConfig.from_fields(fields), fields)


def plan_fields(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; bytes and counts are whole numbers, memory is per GPU unless said otherwise."""
    return {
        "gpus": _gpu_fields(plan.gpus),
        "max_model_len": plan.max_model_len,
        "parts": [dataclasses.asdict(part) for part in plan.inventory.part_sizes()],
        "main_model": _main_fields(plan.inventory),
        "kv_bytes_per_token": {
            dtype: plan.inventory.kv_bytes_per_token(dtype) for dtype in PLANNED_KV_DTYPES
        },
        "fits": plan.shortfall is None,
        "shortfall": plan.shortfall and _shortfall_fields(plan.shortfall),
        "splits": [_split_fields(plan, candidate) for candidate in plan.candidates],
        "decode_ceilings": [dataclasses.asdict(ceiling) for ceiling in decode_ceilings(plan)],
        "modelled": [MEMORY_MODEL, DECODE_MODEL],
    }


def _gpu_fields(gpus: GpuSet) -> dict[str, Any]:
    fields = dataclasses.asdict(gpus.gpu)
    del fields["noun"]
    return {"count": gpus.count, **fields}


def _main_fields(inventory: Inventory) -> dict[str, int]:
    return {
        "num_parameters": sum(group.num_parameters for group in inventory.main),
        "num_bytes": sum(group.num_bytes for group in inventory.main),
        "active_parameters": round(inventory.active_parameters()),
        "bytes_read_per_token": round(inventory.step_bytes(1)),
    }


def _split_fields(plan: Plan, candidate: SplitPlan) -> dict[str, Any]:
    return {
        **dataclasses.asdict(candidate.split),
        "weight_bytes": candidate.rank_bytes,
        "kv_room_bytes_all_gpus": candidate.kv_room_bytes,
        "max_tokens": {dtype: candidate.max_tokens[dtype] for dtype in PLANNED_KV_DTYPES},
        "tokens_per_second_batch_1": _first_speed(plan, candidate),
    }


def _shortfall_fields(shortfall: Shortfall) -> dict[str, Any]:
    return {
        "split": dataclasses.asdict(shortfall.split),
        "weight_bytes": shortfall.weight_bytes,
        "cache_bytes": shortfall.cache_bytes,
        "needed_bytes": shortfall.needed_bytes,
        "gpu_bytes": shortfall.gpus.gpu.memory_bytes,
        "shorter_context": shortfall.shorter_context,
        "fits_without_draft": shortfall.fits_without_draft,
        "num_gpus": shortfall.num_gpus,
        "reason": shortfall.reason,
        "changes": list(shortfall.changes()),
    }


def _report(plan: Plan) -> Iterable[str | Table]:
    yield _parts_table(plan.inventory)
    yield _summary(plan.inventory)
    yield ""
    yield _splits_table(plan)
    yield verdict(plan)
    ceilings = [ceiling for ceiling in decode_ceilings(plan) if plan.best.max_tokens[ceiling.kv_dtype]]
    for dtype in dict.fromkeys(ceiling.kv_dtype for ceiling in ceilings):
        yield ""
        yield _ceilings_table(dtype, [ceiling for ceiling in ceilings if ceiling.kv_dtype == dtype])
    yield ""
    yield MEMORY_MODEL
    yield DECODE_MODEL


def verdict(plan: Plan) -> str:
    """Whether the model fits and with what context, or why not and what would help."""
    best = plan.best
    if plan.shortfall is not None:
        return str(plan.shortfall)
    contexts = " or ".join(
        f"{_context(plan, dtype):,} tokens ({dtype} KV cache)" for dtype in PLANNED_KV_DTYPES
    )
    idle = plan.gpus.count - best.split.num_ranks
    unused = f", which leaves {idle} unused" if idle else ""
    return f"{plan.gpus}: fits, best as {best.split}{unused}; longest context {contexts}."


def _context(plan: Plan, dtype: KVDtype) -> int:
    return min(plan.max_model_len, plan.best.max_tokens[dtype])


def _parts_table(inventory: Inventory) -> Table:
    table = _table("Parts of the model", ["part", "layout"], ["parameters, B", "GiB"])
    parts = inventory.part_sizes()
    main = {group.part for group in inventory.main}
    for part in parts:
        if part.part in main:
            _add_part(table, part)
    totals = _main_fields(inventory)
    table.add_section()
    _add_part(table, PartSize("main model", (), totals["num_parameters"], totals["num_bytes"]))
    for part in parts:
        if part.part not in main:
            _add_part(table, part)
    return table


def _add_part(table: Table, part: PartSize) -> None:
    layouts = " + ".join(part.layouts)
    table.add_row(part.part, layouts, f"{part.num_parameters / 1e9:.3f}", f"{part.num_bytes / GIB:.2f}")


def _summary(inventory: Inventory) -> str:
    totals = _main_fields(inventory)
    caches = ", ".join(f"{inventory.kv_bytes_per_token(dtype):,} B in {dtype}" for dtype in PLANNED_KV_DTYPES)
    return (
        f"A token uses {totals['active_parameters'] / 1e9:.2f} B parameters and at batch 1 reads "
        f"{totals['bytes_read_per_token'] / 1e9:.1f} GB of weights. KV cache of a token: {caches}."
    )


def _splits_table(plan: Plan) -> Table:
    columns = ["TP", "EP", "PP", "weights, GiB a GPU", "KV, GiB in all"]
    columns += [f"{dtype} KV tokens" for dtype in PLANNED_KV_DTYPES]
    columns += [f"{dtype} full requests" for dtype in PLANNED_KV_DTYPES]
    title = f"{plan.gpus}, best split first; a full request has {plan.max_model_len:,} tokens (modelled)"
    table = _table(title, [], [*columns, "tokens/s alone"])
    for candidate in plan.candidates:
        table.add_row(*_split_cells(plan, candidate))
    return table


def _split_cells(plan: Plan, candidate: SplitPlan) -> Iterable[str]:
    tokens = [candidate.max_tokens[dtype] for dtype in PLANNED_KV_DTYPES]
    yield from map(str, dataclasses.astuple(candidate.split))
    yield format_gib(candidate.rank_bytes)
    yield format_gib(candidate.kv_room_bytes)
    yield from (f"{count:,}" for count in tokens)
    yield from (f"{count / plan.max_model_len:.1f}" for count in tokens)
    speed = _first_speed(plan, candidate)
    yield "does not fit" if speed is None else f"{speed:,.0f}"


def _first_speed(plan: Plan, candidate: SplitPlan) -> float | None:
    """Decode ceiling of one request with an empty context; None where the weights do not fit."""
    if not candidate.max_tokens["fp8"]:
        return None
    return decode_ceiling(candidate, plan.inventory, plan.gpus.gpu.bandwidth_tbps, "fp8", 1, 0)


def _ceilings_table(dtype: KVDtype, ceilings: list[Ceiling]) -> Table:
    title = f"Decode ceiling in tokens/s of all requests, {dtype} KV cache (modelled)"
    table = _table(title, ["context of each"], [f"batch {batch}" for batch in BATCHES])
    for context in dict.fromkeys(ceiling.context for ceiling in ceilings):
        speeds = [ceiling.tokens_per_second for ceiling in ceilings if ceiling.context == context]
        table.add_row(f"{context:,}", *("-" if speed is None else f"{speed:,.0f}" for speed in speeds))
    return table


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table
