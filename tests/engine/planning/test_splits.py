from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.planning.inventory import Inventory, assume_inventory
from nybble.engine.planning.placement import Split
from nybble.engine.planning.splits import legal_splits, split_problem

DATA = Path(__file__).parents[1] / "data"
BF16: dict[str, Any] = json.loads((DATA / "glm-4.7-config.json").read_text())
NVFP4: dict[str, Any] = json.loads((DATA / "glm-4.7-nvfp4-config.json").read_text())


def _assumed(fields: dict[str, Any]) -> Inventory:
    return assume_inventory(ModelConfig.from_fields(fields), fields)


def _short(fields: dict[str, Any], **changes: Any) -> Inventory:
    """GLM-4.7 with three dense layers and a sparse one."""
    return _assumed(fields | {"num_hidden_layers": 4} | changes)


@pytest.fixture(scope="module")
def nvidia() -> Inventory:
    return _assumed(NVFP4)


@pytest.mark.parametrize(
    ("split", "problem"),
    [
        (Split(8, 1, 1), None),
        (Split(8, 8, 1), None),
        (Split(8, 8, 3), None),
        (Split(16, 16, 2), None),
        (Split(32, 1, 1), None),
        (Split(24, 1, 1), "TP 24 does not divide a vocabulary of 151552"),
        (Split(5, 1, 1), "TP 5 does not divide 96 query heads"),
        (Split(64, 1, 1), "TP 64 does not divide 96 query heads"),
        (Split(3, 1, 1), "TP 3 neither divides 8 KV heads"),
        (Split(6, 1, 1), "TP 6 neither divides 8 KV heads"),
        (Split(12, 1, 1), "TP 12 neither divides 8 KV heads"),
        (Split(8, 3, 1), "EP 3 is neither 1 nor TP 8"),
        (Split(1, 8, 1), "EP 8 is neither 1 nor TP 1"),
        (Split(1, 1, 93), None),
        (Split(1, 1, 94), "PP 94 exceeds 93 layers"),
        (Split(32, 32, 94), "PP 94 exceeds 93 layers"),
    ],
    ids=str,
)
def test_which_splits_are_possible(split: Split, problem: str | None, nvidia: Inventory) -> None:
    found = split_problem(nvidia, split)
    assert found == problem or (problem is not None and found is not None and found.startswith(problem))


def test_fp4_shards_are_whole_blocks() -> None:
    """GLM-4.5-Air's experts are 1,408 wide: 88 blocks of 16, which 8 ranks share and 16 do not."""
    air = {"moe_intermediate_size": 1408, "n_routed_experts": 128, "intermediate_size": 12288}
    quantized, plain = _short(NVFP4, **air), _short(BF16, **air)
    assert split_problem(quantized, Split(8, 1, 1)) is None
    problem = split_problem(quantized, Split(16, 1, 1))
    assert problem is not None and "1408 columns / 16 are not whole blocks of 16" in problem
    assert split_problem(plain, Split(16, 1, 1)) is None


def test_more_ranks_than_experts_cannot_hold_whole_ones() -> None:
    few = _short(BF16, n_routed_experts=8)
    assert split_problem(few, Split(8, 8, 1)) is None
    assert split_problem(few, Split(16, 16, 1)) == "EP 16 exceeds 8 routed experts"


def test_experts_need_not_divide_evenly() -> None:
    assert split_problem(_short(BF16, n_routed_experts=11), Split(8, 8, 1)) is None


def test_ranks_divide_the_vocabulary() -> None:
    """GLM-4.7's 151,552 is 2^12 x 37."""
    odd = _short(BF16, vocab_size=151_551)
    assert split_problem(odd, Split(1, 1, 4)) is None
    assert split_problem(odd, Split(2, 1, 1)) == "TP 2 does not divide a vocabulary of 151551"


def test_ranks_divide_neurons_in_any_layout() -> None:
    narrow = _short(BF16, intermediate_size=12_292)
    assert split_problem(narrow, Split(4, 1, 1)) is None
    assert split_problem(narrow, Split(8, 1, 1)) == "dense MLP: 12292 columns / 8 are not whole blocks of 1"


def test_blocks_of_a_model_that_is_not_split() -> None:
    crooked = _short(NVFP4, intermediate_size=12_296)
    assert split_problem(crooked, Split(1, 1, 1)) == "dense MLP: 12296 columns / 1 are not whole blocks of 16"


def test_without_its_draft_layer_a_model_has_a_stage_less(nvidia: Inventory) -> None:
    assert split_problem(nvidia.without_draft(), Split(1, 1, 93)) == "PP 93 exceeds 92 layers"
    assert split_problem(nvidia.without_draft(), Split(1, 1, 92)) is None


def test_every_legal_split_of_eight_gpus(nvidia: Inventory) -> None:
    """As many stages as there are GPUs for; 3, 5, 6 and 7 ranks do not divide the KV heads."""
    assert list(legal_splits(nvidia, 8)) == [
        Split(1, 1, 8),
        Split(2, 1, 4),
        Split(2, 2, 4),
        Split(4, 1, 2),
        Split(4, 4, 2),
        Split(8, 1, 1),
        Split(8, 8, 1),
    ]


def test_no_more_stages_than_layers(nvidia: Inventory) -> None:
    assert next(legal_splits(nvidia, 200)) == Split(1, 1, 93)


@pytest.mark.parametrize("num_gpus", [1, 3, 16, 100])
def test_legal_splits_have_no_problem(num_gpus: int, nvidia: Inventory) -> None:
    splits = list(legal_splits(nvidia, num_gpus))
    assert splits and len(set(splits)) == len(splits)
    assert {split_problem(nvidia, split) for split in splits} == {None}
    assert all(split.num_ranks <= num_gpus for split in splits)
