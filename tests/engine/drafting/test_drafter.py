"""Drafts that the engine makes are those of a layer that has seen all of a text, whatever happened before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from draft_oracle import DraftOracle
from running import random_prompt, request, run, tiny_config, tokens
from scripted_drafter import WatchedDrafter
from tiny_glm import make_checkpoint, make_predictable
from transformers import Glm4MoeForCausalLM

from nybble.engine.drafting.drafter import ModelDrafter
from nybble.engine.engine import Engine
from nybble.engine.engine_config import EngineConfig, SpeculationConfig
from nybble.engine.loading import build_engine, load_worker, prepare
from nybble.engine.messages import Request
from nybble.engine.ranks.rank_group import RankGroup

DEPTH = 4
SYSTEM = random_prompt(48, seed=40)  # three blocks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("draft")
    make_checkpoint(directory, seed=11, num_mtp_layers=1)
    make_predictable(directory)
    return directory


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> DraftOracle:
    return DraftOracle(checkpoint, Glm4MoeForCausalLM.from_pretrained(checkpoint).eval())


def watched(config: EngineConfig) -> tuple[Engine, WatchedDrafter]:
    preparation = prepare(replace(config, speculation=SpeculationConfig(num_speculative_tokens=DEPTH)))
    group = RankGroup(preparation.placement)
    worker = load_worker(preparation, group)
    drafter = WatchedDrafter(ModelDrafter(worker, group, preparation.limits.block_size))
    return build_engine(preparation, worker, group, drafter), drafter


def check(
    engine: Engine, drafter: WatchedDrafter, batches: Sequence[Sequence[Request]], oracle: DraftOracle
) -> None:
    """Every fifth draft, of those that were made for a token that came."""
    texts: dict[str, list[int]] = {}
    for batch in batches:
        events = run(engine, *batch)
        texts |= {r.request_id: [*r.prompt_token_ids, *tokens(events[r.request_id])] for r in batch}
    made = [(n, at, drafts) for n, at, drafts in drafter.drafted if drafts and at <= len(texts[n])]
    assert max(len(drafts) for _, _, drafts in made) == DEPTH
    for name, position, drafts in made[::5]:
        assert drafts == oracle.guesses(texts[name][:position], len(drafts)), (name, position)


def requests() -> list[Request]:
    """Greedy and sampled, around the length of a block."""
    sampled = {"temperature": 0.8, "top_k": 20}
    return [
        request(str(n), random_prompt(length, seed=n), 24, seed=n, **(sampled if n % 2 else {}))
        for n, length in enumerate((1, 15, 16, 17, 40))
    ]


def test_in_a_batch(checkpoint: Path, oracle: DraftOracle) -> None:
    check(*watched(tiny_config(checkpoint)), [requests()], oracle)


def test_after_chunks(checkpoint: Path, oracle: DraftOracle) -> None:
    check(*watched(tiny_config(checkpoint, max_num_batched_tokens=13, max_num_seqs=5)), [requests()], oracle)


def test_after_preemption(checkpoint: Path, oracle: DraftOracle) -> None:
    config = replace(tiny_config(checkpoint, kv_cache_memory=0.00012), max_model_len=60)
    engine, drafter = watched(config)
    check(engine, drafter, [[request(str(n), random_prompt(8, seed=n), 50) for n in range(3)]], oracle)
    assert engine.stats().num_preemptions > 0, "the pool is too large for this test"


def test_after_a_cached_prefix(checkpoint: Path, oracle: DraftOracle) -> None:
    """A row depends on the token after it: so a block's last row on the first token after the block."""
    engine, drafter = watched(tiny_config(checkpoint))
    batches = [[request(f"{turn} {n}", (*SYSTEM, n, 7), 12) for n in range(3)] for turn in range(2)]
    check(engine, drafter, [[batches[0][0]], *batches, requests()], oracle)


def test_blocks_that_go_on_differently_are_not_shared(checkpoint: Path) -> None:
    engine, _ = watched(tiny_config(checkpoint))
    run(engine, request("first", (*SYSTEM, 1, 2), 4))
    again = run(engine, request("again", (*SYSTEM, 1, 3), 4))["again"]
    other = run(engine, request("other", (*SYSTEM, 4, 3), 4))["other"]
    assert (again[0].num_cached_tokens, other[0].num_cached_tokens) == (48, 32)
