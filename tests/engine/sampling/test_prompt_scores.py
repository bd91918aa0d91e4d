"""Log-probabilities of prompts against transformers, however the prompt is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import random_prompt, request, tiny_config, tiny_engine
from tiny_glm import make_checkpoint
from transformers import Glm4MoeForCausalLM

from nybble.engine.engine import Engine
from nybble.engine.engine_config import EngineConfig, SpeculationConfig
from nybble.engine.errors import InvalidRequestError
from nybble.engine.messages import PromptLogprobs, Request, TokenEvent, TokenLogprobs
from nybble.engine.sampling.prompt_scores import PromptScores

NUM_TOP = 3
PROMPTS = {str(length): random_prompt(length, seed=length) for length in (1, 2, 17, 33, 64)}


class Model:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.oracle: Glm4MoeForCausalLM = make_checkpoint(directory, seed=11, num_mtp_layers=1)

    @torch.inference_mode()
    def scores(self, prompt: Sequence[int]) -> tuple[list[float], list[list[int]]]:
        """Of the tokens after the first, and the ids that are likeliest in their places."""
        logprobs = self.oracle(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])
        return own[:, 0].tolist(), logprobs.topk(NUM_TOP).indices.tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("glm"))


def _scored(name: str, prompt: Sequence[int], max_tokens: int = 5) -> Request:
    return request(name, prompt, max_tokens, num_prompt_logprobs=NUM_TOP)


def _run(engine: Engine, *requests: Request) -> tuple[dict[str, list[TokenLogprobs]], list[TokenEvent]]:
    """The prompts' log-probabilities, which come before any token, and the tokens."""
    for item in requests:
        engine.add(item)
    scores: dict[str, list[TokenLogprobs]] = {item.request_id: [] for item in requests}
    tokens: list[TokenEvent] = []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, PromptLogprobs):
                assert event.request_id not in {token.request_id for token in tokens}
                scores[event.request_id] += event.logprobs
            else:
                assert isinstance(event, TokenEvent)
                tokens.append(event)
        engine.check()
    return scores, tokens


def _assert_right(model: Model, scores: dict[str, list[TokenLogprobs]]) -> None:
    for name, found in scores.items():
        own, top_ids = model.scores(PROMPTS[name])
        assert [one.logprob for one in found] == pytest.approx(own, abs=2e-4)
        assert [[token_id for token_id, _ in one.top] for one in found] == top_ids


def _all() -> list[Request]:
    return [_scored(name, prompt) for name, prompt in PROMPTS.items()]


@pytest.mark.parametrize("budget", [8, 13, 2048])
def test_batched_and_chunked(model: Model, budget: int) -> None:
    config = tiny_config(model.directory, max_num_batched_tokens=budget, max_num_seqs=8)
    scores, _ = _run(tiny_engine(config), *_all())
    _assert_right(model, scores)


def test_with_drafts(model: Model) -> None:
    speculation = SpeculationConfig(num_speculative_tokens=2)
    config = replace(
        tiny_config(model.directory, max_num_batched_tokens=16, max_num_seqs=8), speculation=speculation
    )
    scores, tokens = _run(tiny_engine(config), *_all())
    _assert_right(model, scores)
    plain = _run(tiny_engine(tiny_config(model.directory)), *(request(n, p, 5) for n, p in PROMPTS.items()))[
        1
    ]
    assert _by_request(tokens) == _by_request(plain)


def test_preempted(model: Model) -> None:
    config = replace(tiny_config(model.directory, kv_cache_memory=0.0002), max_model_len=100)
    engine = tiny_engine(config)
    scores, _ = _run(engine, *(_scored(name, prompt, 36) for name, prompt in PROMPTS.items()))
    assert engine.stats().num_preemptions > 0, "the pool is too large for this test"
    _assert_right(model, scores)


def test_what_is_cached_is_computed_again_and_can_be_found(model: Model) -> None:
    engine = tiny_engine(tiny_config(model.directory))
    for _ in range(2):
        scores, tokens = _run(engine, _scored("64", PROMPTS["64"]))
        _assert_right(model, scores)
        assert tokens[0].num_cached_tokens == 0
    _, tokens = _run(engine, request("after", PROMPTS["64"]))
    assert tokens[0].num_cached_tokens == 48


def test_a_step_has_rows_for_a_few_only(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.engine.scheduling.step_budget.MAX_SCORES_IN_STEP", 5)
    engine = tiny_engine(tiny_config(model.directory))
    engine.add(_scored("33", PROMPTS["33"], max_tokens=1))
    engine.add(_scored("17", PROMPTS["17"], max_tokens=1))
    engine.add(request("plain", PROMPTS["64"], 1))
    found = dict.fromkeys(("33", "17"), 0)
    while engine.has_work:
        steps = [event for event in engine.step() if isinstance(event, PromptLogprobs)]
        assert sum(len(event.logprobs) for event in steps) <= 5
        for event in steps:
            found[event.request_id] += len(event.logprobs)
    assert found == {"33": 32, "17": 16}


def test_a_prompt_alone(model: Model) -> None:
    """max_tokens 0; a stop token does not make it an answer that stopped, nor must there be room for one."""
    config: EngineConfig = replace(tiny_config(model.directory), max_model_len=64)
    engine = tiny_engine(config)
    item = request("64", PROMPTS["64"], 0, num_prompt_logprobs=NUM_TOP, stop_token_ids=tuple(range(160)))
    scores, tokens = _run(engine, item)
    _assert_right(model, scores)
    assert [token.finish_reason for token in tokens] == ["length"]


@pytest.mark.parametrize("count", [-1, 21])
def test_out_of_range(model: Model, count: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tiny_engine(tiny_config(model.directory)).add(request("a", (1, 2), num_prompt_logprobs=count))
    assert caught.value.parameter == "num_prompt_logprobs"


def test_positions_are_those_whose_next_token_is_not_done() -> None:
    scores = PromptScores((10, 11, 12, 13, 14), num_top=0)
    assert list(scores.positions(0, 3)) == [0, 1, 2]
    assert list(scores.following(scores.positions(0, 3))) == [11, 12, 13]
    scores.add([TokenLogprobs(logprob=-1.0, top=())] * 3)
    assert len(scores.take()) == 3 and scores.take() == ()
    assert list(scores.positions(0, 3)) == []  # computed again
    assert list(scores.positions(0, 5)) == list(scores.positions(3, 7)) == [3]
    assert list(scores.following(range(3, 4))) == [14]
    assert not scores.is_complete
    scores.add([TokenLogprobs(logprob=-1.0, top=())])
    assert scores.is_complete and list(scores.positions(0, 9)) == []


def test_a_prompt_of_one_token_has_none() -> None:
    assert PromptScores((10,), num_top=0).is_complete


def _by_request(tokens: Sequence[TokenEvent]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for token in tokens:
        found.setdefault(token.request_id, []).append(token.token_id)
    return found
