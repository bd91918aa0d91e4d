"""Speculation changes when tokens come, never which: through the whole engine, with drafts of every kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import random_prompt, request, run, tiny_config, tiny_engine, tokens
from scripted_drafter import Kind, ScriptedDrafter
from tiny_glm import VARIANTS, make_checkpoint, make_predictable
from transformers import Glm4MoeForCausalLM

from nybble.engine.drafting.drafter import Drafter, Drafts
from nybble.engine.engine import Engine
from nybble.engine.engine_config import EngineConfig, SpeculationConfig
from nybble.engine.loading import load_engine, prepare
from nybble.engine.messages import Request, RequestFailed, SpeculationStats, TokenEvent
from nybble.engine.scheduling.step import SampledToken, StepPlan

KINDS: tuple[Kind, ...] = ("right", "wrong", "mixed", "too few")
LENGTHS = (1, 15, 17, 40)
SAMPLED = {
    "temperature": 0.8,
    "top_p": 0.95,
    "top_k": 40,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.2,
}
Answers = dict[str, list[int]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("glm")
    make_checkpoint(directory, seed=11, num_mtp_layers=1)
    make_predictable(directory)
    return directory


def requests() -> list[Request]:
    """Greedy and sampled in turn, of many lengths."""
    return [
        request(str(n), random_prompt(length, seed=n), 20, seed=n, **(SAMPLED if n % 2 else {}))
        for n, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Answers:
    return answers_of(run(tiny_engine(tiny_config(checkpoint)), *requests()))


def answers_of(events: dict[str, list[TokenEvent]]) -> Answers:
    return {request_id: tokens(listed) for request_id, listed in events.items()}


def speculating(config: EngineConfig, depth: int = 4, drafter: Drafter | None = None) -> Engine:
    speculation = SpeculationConfig(num_speculative_tokens=depth)
    return load_engine(prepare(replace(config, speculation=speculation)), drafter)


def stats_of(engine: Engine) -> SpeculationStats:
    stats = engine.stats().speculation
    assert stats is not None
    return stats


CONFIGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 13, "max_num_seqs": 2},
}


@pytest.mark.parametrize("scheduler", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_without(checkpoint: Path, plain: Answers, kind: Kind, scheduler: str) -> None:
    drafter = ScriptedDrafter(kind, requests(), plain)
    engine = speculating(tiny_config(checkpoint, **CONFIGS[scheduler]), 4, drafter)
    assert answers_of(run(engine, *requests())) == plain
    stats = stats_of(engine)
    accepted, drafted = sum(stats.num_accepted), sum(stats.num_drafts)
    assert drafted
    if kind == "right":
        assert accepted == drafted
    elif kind == "wrong":
        assert accepted == 0
    else:
        assert 0 < accepted <= drafted


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_after_preemption_are_those_without(checkpoint: Path, kind: Kind) -> None:
    items = [request(str(n), random_prompt(8, seed=n), 50, seed=n) for n in range(3)]
    plain = answers_of(run(tiny_engine(tiny_config(checkpoint)), *items))
    config = replace(tiny_config(checkpoint, kv_cache_memory=0.00012), max_model_len=60)
    engine = speculating(config, 4, ScriptedDrafter(kind, items, plain))
    assert answers_of(run(engine, *items)) == plain
    assert engine.stats().num_preemptions > 0, "the pool is too large for this test"
    assert sum(stats_of(engine).num_drafts)


@pytest.mark.parametrize("kind", ["wrong", "mixed"])
def test_tokens_after_a_cached_prefix_are_those_without(checkpoint: Path, plain: Answers, kind: Kind) -> None:
    """What rejected drafts wrote to blocks is not found again."""
    engine = speculating(tiny_config(checkpoint), 4, ScriptedDrafter(kind, requests(), plain))
    for _ in range(2):
        assert answers_of(run(engine, *requests())) == plain
    longer = [
        request(f"{r.request_id} goes on", (*r.prompt_token_ids, *plain[r.request_id], 3), 8)
        for r in requests()
    ]
    expected = answers_of(run(tiny_engine(tiny_config(checkpoint)), *longer))
    events = run(speculating(tiny_config(checkpoint), 4, ScriptedDrafter(kind, longer, expected)), *longer)
    assert answers_of(events) == expected
    engine = speculating(tiny_config(checkpoint), 4)
    run(engine, *requests())
    events = run(engine, *longer)
    assert answers_of(events) == expected
    assert sum(listed[0].num_cached_tokens for listed in events.values()) > 0


@pytest.mark.parametrize("kind", ["right", "mixed"])
def test_aborts_disturb_nobody(checkpoint: Path, plain: Answers, kind: Kind) -> None:
    engine = speculating(tiny_config(checkpoint), 4, ScriptedDrafter(kind, requests(), plain))
    free = engine.stats().num_free_blocks
    for item in requests():
        engine.add(item)
    answers: Answers = {item.request_id: [] for item in requests()}
    gone: set[str] = set()
    while engine.has_work:
        for event in engine.step():
            answers[event.request_id].append(event.token_id)
        for request_id, after in (("1", 1), ("2", 4)):
            if len(answers[request_id]) >= after and request_id not in gone:
                engine.abort(request_id)
                gone.add(request_id)
        engine.check()
    for request_id, answer in answers.items():
        assert answer == plain[request_id][: len(answer)]
        assert request_id in gone or len(answer) == 20
    assert engine.stats().num_free_blocks == free


def test_accepted_tokens_come_together_and_end_where_they_should(checkpoint: Path) -> None:
    """max_tokens, stop tokens and min_tokens inside a run of accepted drafts; logprobs of each token."""
    prompt, config = random_prompt(10, seed=32), tiny_config(checkpoint)
    plain = run(tiny_engine(config), request("a", prompt, 20, num_logprobs=3))["a"]
    stop = tokens(plain)[6]
    first = tokens(plain).index(stop)
    for limits in (
        {"max_tokens": 7},
        {"max_tokens": 20, "stop_token_ids": (stop,)},
        {"max_tokens": 20, "stop_token_ids": (stop,), "min_tokens": first + 1},
        {"max_tokens": 20, "stop_token_ids": (stop,), "min_tokens": 12},
    ):
        item = request("a", prompt, num_logprobs=3, **limits)
        expected = run(tiny_engine(config), item)["a"]
        drafter = ScriptedDrafter("right", [item], {"a": tokens(expected)})
        engine = speculating(config, 4, drafter)
        events = run(engine, item)["a"]
        assert [(e.token_id, e.finish_reason) for e in events] == [
            (e.token_id, e.finish_reason) for e in expected
        ]
        for event, wanted in zip(events, expected, strict=True):
            assert event.logprobs is not None and wanted.logprobs is not None
            assert event.logprobs.logprob == pytest.approx(wanted.logprobs.logprob, abs=1e-4)
            assert [i for i, _ in event.logprobs.top] == [i for i, _ in wanted.logprobs.top]


def test_right_drafts_take_fewer_steps(checkpoint: Path, plain: Answers) -> None:
    engine = speculating(tiny_config(checkpoint), 4, ScriptedDrafter("right", requests(), plain))
    engine.add(requests()[0])
    num_steps = 0
    while engine.has_work:
        engine.step()
        num_steps += 1
    assert num_steps <= 1 + -(-19 // 5) + 1


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_with_the_draft_layer_are_those_without(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=1, num_mtp_layers=1, **VARIANTS[name])
    make_predictable(tmp_path)
    config, items = tiny_config(tmp_path), [request(str(n), random_prompt(n, seed=n), 16) for n in (3, 30)]
    expected = answers_of(run(tiny_engine(config), *items))
    engine = speculating(config, 3)
    assert answers_of(run(engine, *items)) == expected
    assert sum(stats_of(engine).num_accepted) > 0


def test_deterministic_drafts_change_no_bit(checkpoint: Path) -> None:
    """Verified together, tokens have the logprobs that they have one by one."""
    config = replace(tiny_config(checkpoint), deterministic=True)
    items = [request(str(n), random_prompt(9 + n, seed=n), 12, num_logprobs=2) for n in range(2)]
    plain = run(tiny_engine(config), *items)
    engine = speculating(config, 3, ScriptedDrafter("mixed", items, answers_of(plain)))
    drafted = run(engine, *items)
    assert sum(stats_of(engine).num_accepted)
    for name, events in plain.items():
        assert [(e.token_id, e.logprobs) for e in drafted[name]] == [(e.token_id, e.logprobs) for e in events]


class FailsOnce(ScriptedDrafter):
    """Fails after the first step."""

    has_failed = False

    def draft(
        self, plan: StepPlan, sampled: Sequence[tuple[SampledToken, ...]], num_drafts: Mapping[str, int]
    ) -> Drafts:
        if not self.has_failed:
            self.has_failed = True
            raise RuntimeError("no drafts")
        return super().draft(plan, sampled, num_drafts)


def test_a_drafter_that_fails_ends_its_step_and_leaves_nothing_cached(
    checkpoint: Path, plain: Answers
) -> None:
    """Blocks without the draft layer's keys and values must not be found."""
    item = requests()[-1]
    engine = speculating(tiny_config(checkpoint), 4, FailsOnce("right", requests(), plain))
    engine.add(item)
    (failed,) = engine.step()
    assert isinstance(failed, RequestFailed) and failed.request_id == item.request_id
    assert not engine.has_work and engine.failure is None
    engine.check()
    events = run(engine, item)[item.request_id]
    assert events[0].num_cached_tokens == 0
    assert tokens(events) == plain[item.request_id]


def test_the_same_seed_gives_the_same_tokens(checkpoint: Path) -> None:
    item = request("a", random_prompt(9, seed=3), 40, seed=5, temperature=1.0)
    first, again = (run(speculating(tiny_config(checkpoint), 2), item)["a"] for _ in range(2))
    assert tokens(first) == tokens(again)


# How sampled tokens are distributed.

PROMPT = random_prompt(12, seed=50)
SAMPLING: dict[str, Any] = {"temperature": 1.3, "top_k": 3, "presence_penalty": 0.7}
NUM_SAMPLES = 2000
CRITICAL = 26.1  # chi-square with 8 degrees of freedom exceeds this once in 1,000 times


@torch.inference_mode()
def exact_pairs(directory: Path) -> dict[tuple[int, int], float]:
    """The distribution of the first two tokens after PROMPT, in float64 from transformers' logits."""
    model = Glm4MoeForCausalLM.from_pretrained(directory).eval()

    def distribution(text: Sequence[int], seen: Sequence[int]) -> dict[int, float]:
        logits = model(torch.tensor([list(text)])).logits[0, -1].double()
        for token_id in set(seen):
            logits[token_id] -= SAMPLING["presence_penalty"]
        best, ids = (logits / SAMPLING["temperature"]).topk(SAMPLING["top_k"])
        return dict(zip(ids.tolist(), best.softmax(dim=0).tolist(), strict=True))

    return {
        (first, second): p * q
        for first, p in distribution(PROMPT, ()).items()
        for second, q in distribution((*PROMPT, first), (first,)).items()
    }


class OneGuess:
    """Drafts the same token, whatever came."""

    def __init__(self, guess: int) -> None:
        self._guess = guess

    def draft(
        self, plan: StepPlan, sampled: Sequence[tuple[SampledToken, ...]], num_drafts: Mapping[str, int]
    ) -> Drafts:
        return dict.fromkeys(num_drafts, (self._guess,))


@pytest.mark.parametrize("rank", [0, 1, None])
def test_sampled_tokens_are_distributed_as_without(checkpoint: Path, rank: int | None) -> None:
    """Drafts that are likely, less likely, and never right: chi-square over the first two tokens."""
    exact = exact_pairs(checkpoint)
    seconds = dict.fromkeys([second for _, second in exact], 0.0)
    for (_, second), probability in exact.items():
        seconds[second] += probability
    ranked = sorted(seconds, key=lambda token_id: -seconds[token_id])
    guess = ranked[rank] if rank is not None else min({*range(160)} - seconds.keys())
    engine = speculating(tiny_config(checkpoint), 1, OneGuess(guess))
    items = [request(str(n), PROMPT, 2, seed=n, **SAMPLING) for n in range(NUM_SAMPLES)]
    counts = Counter(tuple(answer) for answer in answers_of(run(engine, *items)).values())
    assert set(counts) <= set(exact)
    distance = sum((counts[pair] - NUM_SAMPLES * p) ** 2 / (NUM_SAMPLES * p) for pair, p in exact.items())
    assert distance < CRITICAL
