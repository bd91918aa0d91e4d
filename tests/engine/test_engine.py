"""The engine must give a request the same tokens whatever happens around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_harness import Harness, distinct_prompt
from running import random_prompt, request, run, tiny_config, tiny_engine, tokens
from tiny_glm import make_checkpoint

from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import (
    ContextLengthError,
    EngineBrokenError,
    InvalidRequestError,
    QueueFullError,
)
from nybble.engine.messages import Request, RequestFailed
from nybble.engine.scheduling.step import StepPlan

LENGTHS = (1, 5, 15, 16, 17, 31, 40, 64)
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 40}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("glm")
    make_checkpoint(directory, seed=11)
    return directory


def requests() -> list[Request]:
    """Greedy and sampled in turn, of many lengths."""
    return [
        request(str(n), random_prompt(length, seed=n), 24, seed=n, **(SAMPLED if n % 2 else {}))
        for n, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, list[int]]:
    """Each request's tokens when it runs by itself, without any cache."""
    results = {}
    for item in requests():
        results |= run(tiny_engine(tiny_config(checkpoint)), item)
    return {request_id: tokens(events) for request_id, events in results.items()}


def check_same(config: EngineConfig, alone: dict[str, list[int]]) -> None:
    results = run(tiny_engine(config), *requests())
    assert {request_id: tokens(events) for request_id, events in results.items()} == alone


def test_batched_equals_alone(checkpoint: Path, alone: dict[str, list[int]]) -> None:
    check_same(tiny_config(checkpoint), alone)


@pytest.mark.parametrize("budget", [8, 13, 50])
def test_chunked_equals_whole(checkpoint: Path, alone: dict[str, list[int]], budget: int) -> None:
    check_same(tiny_config(checkpoint, max_num_batched_tokens=budget, max_num_seqs=8), alone)


def test_planned_ahead_equals_not(checkpoint: Path, alone: dict[str, list[int]]) -> None:
    """All other tests here plan ahead."""
    engine = tiny_engine(tiny_config(checkpoint))
    engine._scheduler.predict = lambda plan: None  # type: ignore[method-assign]
    results = run(engine, *requests())
    assert {request_id: tokens(events) for request_id, events in results.items()} == alone


def test_preempted_equals_not(checkpoint: Path, alone: dict[str, list[int]]) -> None:
    config = replace(tiny_config(checkpoint, kv_cache_memory=0.0002), max_model_len=100)
    engine = tiny_engine(config)
    results = run(engine, *requests())
    assert engine.stats().num_preemptions > 0, "the pool is too large for this test"
    assert {request_id: tokens(events) for request_id, events in results.items()} == alone


def test_cached_prefix_equals_uncached(checkpoint: Path, alone: dict[str, list[int]]) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    for _ in range(2):
        results = run(engine, *requests())
        assert {request_id: tokens(events) for request_id, events in results.items()} == alone
    cached = {request_id: events[0].num_cached_tokens for request_id, events in results.items()}
    assert cached == {str(n): (length - 1) // 16 * 16 for n, length in enumerate(LENGTHS)}


def test_shared_prefix_is_cached_across_requests(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    system = random_prompt(48, seed=20)
    run(engine, request("a", system + random_prompt(9, seed=21)))
    events = run(engine, request("b", system + random_prompt(7, seed=22)))["b"]
    assert events[0].num_cached_tokens == 48
    alone = run(tiny_engine(tiny_config(checkpoint)), request("b", system + random_prompt(7, seed=22)))
    assert tokens(events) == tokens(alone["b"])


def test_same_seed_same_tokens_other_seed_others(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    prompt = random_prompt(10, seed=30)
    first, again, other = (
        tokens(run(engine, request("a", prompt, 32, seed=seed, temperature=1.0))["a"]) for seed in (7, 7, 8)
    )
    assert first == again != other


def test_without_a_seed_answers_differ(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    prompt = random_prompt(10, seed=31)
    answers = {tuple(tokens(run(engine, request("a", prompt, 32, temperature=1.0))["a"])) for _ in range(3)}
    assert len(answers) == 3


def test_ends_at_max_tokens_and_at_stop_tokens(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    prompt = random_prompt(10, seed=32)
    events = run(engine, request("a", prompt, 20))["a"]
    assert [event.finish_reason for event in events] == [None] * 19 + ["length"]
    stop = events[4].token_id
    stopped = run(engine, request("a", prompt, 20, stop_token_ids=(stop,)))["a"]
    first = tokens(events).index(stop)
    assert tokens(stopped) == tokens(events)[: first + 1]
    assert stopped[-1].finish_reason == "stop"


def test_min_tokens_holds_back_stop_tokens(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    prompt = random_prompt(10, seed=32)
    plain = tokens(run(engine, request("a", prompt, 20))["a"])
    stops = tuple(set(plain))
    events = run(engine, request("a", prompt, 20, stop_token_ids=stops, min_tokens=7))["a"]
    assert not set(tokens(events[:7])) & set(stops)
    assert len(events) >= 8 or events[-1].finish_reason == "length"
    ended = run(engine, request("a", prompt, 20, stop_token_ids=tuple(range(1, 160)), min_tokens=7))["a"]
    assert tokens(ended[:7]) == [0] * 7 and len(ended) <= 20


def test_penalties_are_the_same_chunked_preempted_and_alone(checkpoint: Path) -> None:
    penalties = {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "logit_bias": ((5, 3.0),)}
    asked = [
        request(str(n), random_prompt(length, seed=n), 24, seed=n, **SAMPLED, **penalties)
        for n, length in enumerate(LENGTHS)
    ]
    alone = {
        item.request_id: tokens(run(tiny_engine(tiny_config(checkpoint)), item)[item.request_id])
        for item in asked
    }
    small = replace(tiny_config(checkpoint, kv_cache_memory=0.0002), max_model_len=100)
    for config in (small, tiny_config(checkpoint, max_num_batched_tokens=13, max_num_seqs=8)):
        engine = tiny_engine(config)
        results = run(engine, *asked)
        assert {request_id: tokens(events) for request_id, events in results.items()} == alone
        assert engine.stats().num_preemptions > 0 or config is not small


def test_allowed_tokens_are_all_that_come(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    allowed = (3, 77, 159)
    events = run(engine, request("a", (1, 2), 30, temperature=2.0, allowed_token_ids=allowed))["a"]
    assert set(tokens(events)) == set(allowed)


def test_refuses_a_bad_parameter_and_goes_on(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    with pytest.raises(InvalidRequestError) as caught:
        engine.add(request("bad", (1, 2), 5, logit_bias=((160, 1.0),)))
    assert caught.value.parameter == "logit_bias"
    assert len(run(engine, request("good", (1, 2), 3))["good"]) == 3


def test_abort_frees_everything_at_once(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    free = engine.stats().num_free_blocks
    engine.add(request("a", random_prompt(40, seed=33), 50))
    for _ in range(3):
        engine.step()
    assert engine.stats().num_free_blocks < free
    engine.abort("a")
    engine.abort("unknown")
    assert engine.stats().num_free_blocks == free
    assert not engine.has_work
    engine.check()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "parameter"),
    [
        ((), 5, "prompt"),
        ((1, 160), 5, "prompt"),
        ((-1,), 5, "prompt"),
        ((1, 2), -1, "max_tokens"),
        ((1,) * 500, 13, "max_tokens"),
        ((1,) * 512, 1, "prompt"),
    ],
)
def test_refuses_by_parameter(
    checkpoint: Path, prompt: tuple[int, ...], max_tokens: int, parameter: str
) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    with pytest.raises(InvalidRequestError) as caught:
        engine.add(request("a", prompt, max_tokens))
    assert caught.value.parameter == parameter
    assert not engine.has_work


def test_fills_the_context_exactly(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    assert len(run(engine, request("a", (1,) * 500, 12))["a"]) == 12
    with pytest.raises(ContextLengthError, match="at most 12 are left"):
        engine.add(request("b", (1,) * 500, 13))


def test_refuses_an_id_in_use_only_while_in_use(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    engine.add(request("a", (1, 2)))
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add(request("a", (1, 2)))
    while engine.has_work:
        engine.step()
    engine.add(request("a", (1, 2)))


# The caller's work beside a step.


def test_the_caller_s_work_is_done_once_a_step_before_its_tokens_are_there(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    engine.add(request("a", (1, 2), 3))
    seen: list[int] = []
    while engine.has_work:
        engine.step(lambda: seen.append(engine.stats().num_generated_tokens))
    assert seen == [0, 1, 2]
    engine.step(lambda: seen.append(-1))  # with nothing to run, too
    assert seen == [0, 1, 2, -1]


def test_a_failure_of_the_caller_s_work_loses_no_token(checkpoint: Path) -> None:
    engine = tiny_engine(tiny_config(checkpoint))
    engine.add(request("a", (1, 2), 3))

    def fail() -> None:
        raise OSError("closed")

    with pytest.raises(OSError, match="closed"):
        engine.step(fail)
    engine.check()
    assert engine.stats().num_generated_tokens == 1
    assert len(engine.step()) == 1


# Over a runner without a model. Admission.


def test_a_request_beyond_the_queue_is_refused_and_later_taken() -> None:
    harness = Harness(max_waiting=2, max_num_seqs=1)
    for name in "abc":
        harness.add(name, distinct_prompt(5, ord(name)), max_tokens=3)
        harness.step()
    with pytest.raises(QueueFullError, match="2 requests are waiting") as caught:
        harness.add("d", distinct_prompt(5, 4))
    assert caught.value.retry_after > 0
    assert "d" not in harness.scheduler
    while "b" not in harness.running_ids():
        harness.step()
    harness.add("d", distinct_prompt(5, 4))
    harness.drain()
    assert harness.finished == ["a", "b", "c", "d"]


def test_retry_after_comes_from_the_rate_of_completions() -> None:
    harness = Harness(max_waiting=3, max_num_seqs=1)
    for number in range(8):
        harness.now += 10
        harness.add(str(number), distinct_prompt(5, number), max_tokens=1)
        harness.step()
    for name in "abc":
        harness.add(name, distinct_prompt(5, ord(name)))
    with pytest.raises(QueueFullError) as caught:
        harness.add("d", distinct_prompt(5, 4))
    assert caught.value.retry_after == pytest.approx(1.5 / (8 / 70))


# Deadlines.


def test_a_running_request_ends_when_its_time_is_over() -> None:
    harness = Harness()
    harness.add("a", distinct_prompt(5, 1), max_tokens=50, deadline=2.0)
    harness.add("b", distinct_prompt(5, 2), max_tokens=5)
    harness.step()
    harness.now = 1.9
    assert list(harness.step()) == ["a", "b"]
    harness.now = 2.0
    assert list(harness.step()) == ["b"]
    assert harness.failed == {"a": "timeout"}
    harness.drain()
    harness.assert_right_tokens("b", 5)
    assert harness.engine.stats().num_finished == {"timeout": 1, "length": 1}


@pytest.mark.parametrize("max_num_seqs", [1, 2])
def test_a_waiting_or_prefilling_request_ends_when_its_time_is_over(max_num_seqs: int) -> None:
    harness = Harness(max_num_seqs=max_num_seqs, budget=8)
    harness.add("a", distinct_prompt(5, 1), max_tokens=6)
    harness.step()
    harness.now = 5.0
    harness.add("b", distinct_prompt(40, 2), deadline=0.5)
    harness.step()
    assert ("b" in harness.waiting_ids()) == (max_num_seqs == 1)
    harness.now = 5.5
    harness.step()
    assert harness.failed == {"b": "timeout"}
    harness.drain()


def test_a_deadline_of_the_past_changes_nothing_for_others_of_that_name() -> None:
    harness = Harness()
    harness.add("a", distinct_prompt(5, 1), max_tokens=2, deadline=1.0)
    harness.drain()
    harness.add("b", distinct_prompt(5, 1), max_tokens=2, deadline=1.0)
    harness.engine.abort("b")
    harness.finished.clear()
    for name in "ab":
        harness.add(name, distinct_prompt(5, 2), max_tokens=3)
    harness.now = 100.0
    harness.drain()
    assert (harness.finished, harness.failed) == (["a", "b"], {})


# Faults.


def _raise_for(name: str, error: Exception) -> Callable[[StepPlan], Exception | None]:
    return lambda plan: error if any(chunk.request_id == name for chunk in plan.chunks) else None


@pytest.mark.parametrize("error", [RuntimeError("boom"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(error: Exception) -> None:
    harness = Harness(max_num_seqs=2)
    harness.add("a", distinct_prompt(9, 1), max_tokens=9)
    harness.step()
    harness.add("bad", distinct_prompt(9, 2))
    harness.add("waits", distinct_prompt(9, 1), max_tokens=4)
    harness.runner.fault = _raise_for("bad", error)
    harness.step()
    assert harness.failed == {"a": "internal", "bad": "internal"}
    harness.drain()
    assert harness.engine.failure is None
    assert harness.num_cached["waits"] == 8  # what a had computed before is still good
    harness.assert_right_tokens("waits", 4)
    assert harness.engine.stats().num_finished == {"error": 2, "length": 1}
    harness.add("bad", distinct_prompt(9, 2))
    harness.runner.fault = lambda plan: None
    harness.failed.clear()
    harness.drain()
    harness.assert_right_tokens("bad", 4)
    assert harness.num_cached["bad"] == 0  # nothing of the failed step was kept


def test_a_runner_that_breaks_its_word_fails_the_step() -> None:
    harness = Harness()
    harness.add("a", distinct_prompt(9, 1))
    harness.runner.launch = lambda plan: list  # type: ignore[method-assign]
    (event,) = harness.engine.step()
    assert isinstance(event, RequestFailed) and event.request_id == "a" and "ValueError" in event.message
    assert not harness.engine.has_work


def test_an_engine_whose_every_step_fails_stops_and_says_so() -> None:
    harness = Harness(max_num_seqs=2)
    harness.runner.fault = lambda plan: RuntimeError("boom")
    for number in range(12):
        harness.add(str(number), distinct_prompt(5, number))
    while harness.engine.failure is None:
        harness.step()
    assert harness.engine.failure == "5 steps failed one after the other"
    assert list(harness.failed) == [str(number) for number in range(10)]
    with pytest.raises(EngineBrokenError, match="5 steps failed"):
        harness.engine.step()


def test_failures_with_successes_between_them_stop_nothing() -> None:
    harness = Harness()
    for number in range(20):
        harness.runner.fault = _raise_for("bad", RuntimeError("boom"))
        harness.add("bad", distinct_prompt(5, number))
        harness.step()
        harness.add(str(number), distinct_prompt(5, number), max_tokens=1)
        harness.step()
        assert harness.failed.pop("bad") == "internal"
    assert harness.engine.failure is None
    assert len(harness.finished) == 20


def test_a_runner_that_cannot_go_on_stops_the_engine() -> None:
    harness = Harness()
    harness.add("a", distinct_prompt(5, 1))
    harness.runner.fault = lambda plan: RuntimeError("an illegal memory access was encountered")
    harness.runner.has_survived = False
    harness.step()
    assert harness.failed == {"a": "internal"}
    assert harness.engine.failure == "a step failed and the model cannot be run again"


def test_an_unsound_state_stops_the_engine() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add("a", distinct_prompt(5, 1))

    def fault(plan: StepPlan) -> Exception:
        harness.scheduler._pool.allocate(1)  # a block that nobody owns
        return RuntimeError("boom")

    harness.runner.fault = fault
    failed = harness.engine.step()
    assert [event.request_id for event in failed] == ["a"]
    assert harness.engine.failure is not None
    assert harness.engine.failure.startswith("a step failed and left the state unsound: reference counts")


def test_a_request_that_cannot_be_added_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    harness.add("a", distinct_prompt(5, 1), deadline=10.0)
    with monkeypatch.context() as patch:
        patch.setattr("nybble.engine.scheduling.block_pool.hashlib.blake2b", None)
        with pytest.raises(TypeError):
            harness.add("bad", distinct_prompt(9, 2), deadline=10.0)
    harness.engine.check()
    harness.drain()
    assert harness.finished == ["a"]
    assert harness.engine.stats().num_finished == {"length": 1}
