"""A rank of TP 2 x PP 2 that uses everything its group offers and prints what it got, as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from nybble.engine.planning.placement import Placement, Split
from nybble.engine.ranks.launched_rank import LaunchedRank
from nybble.engine.ranks.rank_group import Announced, RankGroup

ANNOUNCEMENTS = [[5], [1 << 40, -1, 7], list(range(3000))]


def report_of(rank: int) -> bytes:
    """None as long as another."""
    return bytes([rank]) * (1 + 1000 * rank)


def hidden_of(rank: int) -> Tensor:
    return torch.full((3, 2), float(rank))


def logits_of(rank: int) -> Tensor:
    return torch.full((1, 4), float(rank))


def _announcements(group: RankGroup) -> list[list[int]]:
    if group.placement.rank == 0:
        for numbers in ANNOUNCEMENTS:
            group.announce(Announced.STEP, torch.tensor(numbers))
        group.announce_end()
        return ANNOUNCEMENTS
    received = []
    while (announced := group.next_announcement()) is not None:
        work, numbers = announced
        assert work is Announced.STEP
        received.append(numbers.tolist())
    return received


def _hidden(group: RankGroup) -> list[list[float]]:
    """What the first stage sent, on the second."""
    if group.placement.is_first_stage:
        group.send_hidden(hidden_of(group.placement.rank))
        return []
    received = torch.empty(3, 2)
    group.receive_hidden(received)
    return received.tolist()


def _logits(group: RankGroup) -> list[list[list[float]]]:
    """What both ranks of the last stage sent, on rank 0."""
    rank = group.placement.rank
    if group.placement.is_last_stage:
        group.send_logits(logits_of(rank))
    parts = [torch.empty(1, 4), torch.empty(1, 4)] if rank == 0 else []
    if parts:
        group.receive_logits(parts)
    return [part.tolist() for part in parts]


def main() -> None:
    rank = LaunchedRank.from_environment().rank
    group = RankGroup(Placement(Split(2, 1, 2), rank))
    result: dict[str, Any] = {
        "sum": group.all_reduce(torch.tensor([1.0, 10.0**rank])).tolist(),
        "ordered sum": group.all_reduce_in_order(torch.tensor([1.0, 10.0**rank])).tolist(),
        "hidden": _hidden(group),
        "logits": _logits(group),
        "announced": _announcements(group),
        "reports": [list(report) for report in group.exchange(report_of(rank))],
    }
    group.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
