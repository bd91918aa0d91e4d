"""Bringing up a rank together with the others: what fails on one fails on all, with one error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import torch

from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import NybbleError
from nybble.engine.loading import Preparation, load_worker, prepare
from nybble.engine.model.worker import Worker
from nybble.engine.ranks.launched_rank import LaunchedRank
from nybble.engine.ranks.rank_group import RankGroup

T = TypeVar("T")


class RanksFailedError(NybbleError):
    """A rank could not start, so none does."""


@dataclass(frozen=True)
class StartedRank:
    preparation: Preparation
    worker: Worker[torch.Tensor]
    group: RankGroup


class _Report(msgspec.Struct, frozen=True):
    """What the ranks tell each other of themselves."""

    error: str | None = None
    fingerprint: str = ""
    num_blocks: int = 0


def start_rank(
    config: EngineConfig,
    on_prepared: Callable[[Preparation], None] = lambda preparation: None,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> StartedRank:
    """Join the group, read and resolve, agree with the others, load.

    `on_prepared` is called before the weights are read, `on_layer` after each layer.

    Raises:
        OptionError: other than the launched number of ranks is asked for.
        RanksFailedError: this rank or another one cannot start; the message is that rank's.
    """
    group = RankGroup(LaunchedRank.from_environment().place(config.parallel.split))
    try:
        preparation, reports = _together(group, lambda: prepare(config), _describe)
        preparation = _agree(preparation, reports)
        on_prepared(preparation)
        worker, _ = _together(
            group, lambda: load_worker(preparation, group, on_layer), lambda worker: _Report()
        )
    except RanksFailedError:
        group.close()
        raise
    return StartedRank(preparation, worker, group)


def _describe(preparation: Preparation) -> _Report:
    num_blocks = preparation.memory.cache_geometry.num_blocks
    return _Report(fingerprint=preparation.fingerprint, num_blocks=num_blocks)


def _together(
    group: RankGroup, work: Callable[[], T], describe: Callable[[T], _Report]
) -> tuple[T, list[_Report]]:
    """Do a part of the start on every rank, and tell the others how it went."""
    result: T | None = None
    try:
        result = work()
        report = describe(result)
    except NybbleError as error:
        report = _Report(error=str(error))
    encoded = group.exchange(msgspec.msgpack.encode(report))
    reports = [msgspec.msgpack.decode(item, type=_Report) for item in encoded]
    if result is None or any(report.error for report in reports):
        raise RanksFailedError(_one_error([report.error for report in reports]))
    return result, reports


def _one_error(errors: list[str | None]) -> str:
    """What the ranks report in one line, each error once; with its first rank unless all agree."""
    if len(set(errors)) == 1:
        return str(errors[0])
    first_ranks: dict[str, int] = {}
    for rank, error in enumerate(errors):
        if error:
            first_ranks.setdefault(error, rank)
    return "; ".join(f"rank {rank}: {error}" for error, rank in first_ranks.items())


def _agree(preparation: Preparation, reports: list[_Report]) -> Preparation:
    """With the KV cache that every rank has room for."""
    for rank, report in enumerate(reports):
        if report.fingerprint != reports[0].fingerprint:
            raise RanksFailedError(
                f"rank {rank} has other options or another checkpoint than rank 0: start all ranks with the "
                "same command and the same files"
            )
    return preparation.with_num_blocks(min(report.num_blocks for report in reports))
