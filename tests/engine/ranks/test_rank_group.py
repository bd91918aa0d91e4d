"""What ranks say to each other arrives, whole and in order."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rank_talk import ANNOUNCEMENTS, hidden_of, logits_of, report_of
from ranks import rank_processes

from nybble.engine.planning.placement import Placement
from nybble.engine.ranks.rank_group import Announced, RankGroup

RANKS = range(4)  # TP 2 x PP 2: stages (0, 1) and (2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    logs = tmp_path_factory.mktemp("ranks")
    with rank_processes("rank_talk.py", [[]] * len(RANKS), logs) as ranks:
        return [json.loads(rank.finish()) for rank in ranks]


def test_partial_sums_stay_within_a_stage(results: list[dict[str, Any]]) -> None:
    for name in ("sum", "ordered sum"):
        assert [result[name] for result in results] == [[2, 11], [2, 11], [2, 1100], [2, 1100]]


def test_hidden_states_go_to_the_same_place_in_the_next_stage(results: list[dict[str, Any]]) -> None:
    expected = [[], [], hidden_of(0).tolist(), hidden_of(1).tolist()]
    assert [result["hidden"] for result in results] == expected


def test_logits_come_to_rank_0_in_order(results: list[dict[str, Any]]) -> None:
    expected = [[logits_of(2).tolist(), logits_of(3).tolist()], [], [], []]
    assert [result["logits"] for result in results] == expected


def test_all_hear_every_announcement(results: list[dict[str, Any]]) -> None:
    assert [result["announced"] for result in results] == [ANNOUNCEMENTS] * len(RANKS)


def test_all_have_the_reports_of_all(results: list[dict[str, Any]]) -> None:
    expected = [list(report_of(rank)) for rank in RANKS]
    assert [result["reports"] for result in results] == [expected] * len(RANKS)


def test_alone_it_needs_nobody() -> None:
    group = RankGroup(Placement())
    assert group.is_alone
    assert group.exchange(b"report") == [b"report"]
    assert group.all_reduce(torch.ones(2)).tolist() == [1, 1]
    assert group.all_reduce_in_order(torch.ones(2)).tolist() == [1, 1]
    assert [share.tolist() for share in group.gather_stage(torch.ones(2))] == [[1, 1]]
    group.announce(Announced.STEP, torch.tensor([1]))
    group.announce_end()
    group.close()
