"""Launching and waiting: in the caller's thread and in one of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from nybble.engine.messages import SamplingParams
from nybble.engine.model.model_runner import ModelRunner
from nybble.engine.planning.placement import Placement
from nybble.engine.ranks.rank_group import RankGroup
from nybble.engine.sampling.sampler import Sampler
from nybble.engine.scheduling.step import Chunk, SampledToken, StepInput, StepPlan
from nybble.kernels.reference_ops import ReferenceOps

NUM_TOKENS = 50


@dataclass
class GatedWorker:
    """Its logits point from a token to the one after it. Waits in each step for `may_go`."""

    may_go: threading.Event = field(default_factory=threading.Event)
    threads: list[str] = field(default_factory=list)
    error: Exception | None = None

    def execute(self, step: StepInput) -> Tensor | None:
        assert torch.is_inference_mode_enabled()
        self.may_go.wait(10)
        self.threads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        if not len(step.logit_rows):
            return None
        following = (step.token_ids[step.logit_rows] + 1) % NUM_TOKENS
        return torch.nn.functional.one_hot(following, NUM_TOKENS).float()


@pytest.fixture
def thread() -> Iterator[Executor]:
    with ThreadPoolExecutor(1, "step") as executor:
        yield executor


def _runner(worker: GatedWorker, thread: Executor | None) -> ModelRunner[Tensor]:
    sampler = Sampler(ReferenceOps(torch.float32), NUM_TOKENS)
    return ModelRunner(worker, sampler, RankGroup(Placement()), 4, thread)


def _plan(*token_ids: int, samples: bool = True) -> StepPlan:
    sampling = SamplingParams(max_tokens=1, temperature=0.0) if samples else None
    return StepPlan(tuple(Chunk(str(n), [n], 0, [n], sampling) for n in token_ids))


def test_a_launch_does_not_wait_for_its_thread(thread: Executor) -> None:
    worker = GatedWorker()
    wait = _runner(worker, thread).launch(_plan(7, 3))
    assert worker.threads == []
    worker.may_go.set()
    assert wait() == [(SampledToken(8, None),), (SampledToken(4, None),)]
    assert worker.threads == ["step_0"]


def test_without_a_thread_the_caller_s_computes() -> None:
    worker = GatedWorker()
    worker.may_go.set()
    wait = _runner(worker, None).launch(_plan(7))
    assert worker.threads == [threading.current_thread().name]
    assert wait() == [(SampledToken(8, None),)]


@pytest.mark.parametrize("has_thread", [False, True])
def test_a_plan_that_samples_nothing(has_thread: bool, thread: Executor) -> None:
    worker = GatedWorker()
    worker.may_go.set()
    assert _runner(worker, thread if has_thread else None).launch(_plan(7, samples=False))() == []


def test_an_error_in_the_thread_comes_out_of_the_wait_and_the_next_step_runs(thread: Executor) -> None:
    worker = GatedWorker(error=RuntimeError("out of memory"))
    worker.may_go.set()
    runner = _runner(worker, thread)
    wait = runner.launch(_plan(7))
    with pytest.raises(RuntimeError, match="out of memory"):
        wait()
    worker.error = None
    assert runner.launch(_plan(1))() == [(SampledToken(2, None),)]


def test_a_prepared_plan_runs_with_the_tokens_that_came_since(thread: Executor) -> None:
    worker = GatedWorker()
    worker.may_go.set()
    runner = _runner(worker, thread)
    plan = _plan(0, 0)
    runner.prepare(plan)
    for chunk, token_id in zip(plan.chunks, (7, 3), strict=True):
        chunk.token_ids[0] = token_id  # type: ignore[index]
    assert runner.launch(plan)() == [(SampledToken(8, None),), (SampledToken(4, None),)]


def test_another_plan_than_the_prepared_one_runs_too() -> None:
    worker = GatedWorker()
    worker.may_go.set()
    runner = _runner(worker, None)
    prepared = _plan(1, 2)
    runner.prepare(prepared)
    assert runner.launch(_plan(5))() == [(SampledToken(6, None),)]
    assert runner.launch(prepared)() == [(SampledToken(2, None),), (SampledToken(3, None),)]
