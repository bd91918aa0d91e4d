"""Times of a scripted clock, so that every figure is known beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from running import random_prompt, request

from nybble.engine.engine import Engine
from nybble.engine.engine_bench import BenchCase, BenchError, Spread, measure
from nybble.engine.engine_config import EngineConfig, SchedulerConfig
from nybble.engine.messages import TokenEvent
from nybble.engine.model.null_model import NULL_MODEL, null_engine


def _engine(**scheduler: int) -> Engine:
    return null_engine(EngineConfig(checkpoint=NULL_MODEL, scheduler=SchedulerConfig(**scheduler)), 256)


def _ticks(seconds: Sequence[float] = (1.0,)) -> Callable[[], float]:
    """A clock that goes on by these at each look, in turn."""
    times = itertools.accumulate(itertools.cycle(seconds))
    return lambda: next(times)


def test_one_step_a_second() -> None:
    result = measure(_engine(max_num_seqs=4), BenchCase(4, 10, 5), 1, num_token_ids=1000, clock=_ticks())
    assert result.num_steps == 5
    assert result.prefill_tokens_per_s == 40  # all prompts in the first step
    assert result.decode_tokens_per_s == 4
    assert result.time_to_first_token == Spread(1, 1, 1, 1)
    assert result.inter_token_latency == result.decode_step == Spread(1, 1, 1, 1)
    assert result.stats.num_preemptions == 0


def test_chunked_prompts() -> None:
    """Two prompts of 10 under a budget of 10: the first token of the second comes when the first decodes."""
    engine = _engine(max_num_seqs=2, max_num_batched_tokens=10)
    result = measure(engine, BenchCase(2, 10, 4), 1, 0, num_token_ids=1000, clock=_ticks())
    # Tokens of the steps: 10 | 1 + 9 | 1 + 1 | 1 + 1 | 1 | 1.
    assert result.num_steps == 6
    assert result.time_to_first_token == Spread(2.0, 1.2, 2.8, 1.0)
    assert result.prefill_tokens_per_s == pytest.approx(20 / 3)
    assert result.decode_step == Spread(1, 1, 1, 1)


def test_warm_up_is_not_counted() -> None:
    """A run of three steps looks at the clock four times: the first run's looks are slow."""
    seconds = [100.0] * 4 + [1.0] * 4 + [2.0] * 4
    result = measure(_engine(), BenchCase(1, 4, 3), 2, 1, num_token_ids=1000, clock=_ticks(seconds))
    assert result.time_to_first_token == Spread(1.5, 1.1, 1.9, 1.0)
    assert result.inter_token_latency is not None and result.inter_token_latency.least == 1.0


def test_a_single_token_has_no_decoding() -> None:
    result = measure(_engine(), BenchCase(2, 4, 1), 1, num_token_ids=1000, clock=_ticks())
    assert result.decode_tokens_per_s is result.inter_token_latency is result.decode_step is None


def test_queued_requests_wait_and_are_gone_after() -> None:
    engine = _engine(max_num_seqs=2)
    result = measure(engine, BenchCase(2, 4, 3, num_queued=50), 2, num_token_ids=1000, clock=_ticks())
    assert result.num_steps == 3
    assert not engine.has_work


def test_prompts_are_fresh_in_every_run() -> None:
    """Else the prefix cache would answer, and prefill look fast."""
    seen: list[tuple[int, ...]] = []
    engine = _engine()
    add = engine.add

    def watch(item: object) -> None:
        seen.append(item.prompt_token_ids)  # type: ignore[attr-defined]
        add(item)  # type: ignore[arg-type]

    engine.add = watch  # type: ignore[method-assign]
    measure(engine, BenchCase(3, 20, 2), 2, 1, num_token_ids=50, clock=_ticks())
    assert len(set(seen)) == 9 and all(0 <= min(p) <= max(p) < 50 for p in seen)


def test_a_request_that_ends_early_has_no_times() -> None:
    engine = _engine()
    step = engine.step
    first_events: list[TokenEvent] = []

    def lose_the_first() -> list[TokenEvent]:
        events = step()
        if first_events:
            return events
        first_events.extend(events)
        return []

    engine.step = lose_the_first  # type: ignore[method-assign]
    with pytest.raises(BenchError, match=r"2 x \(4 \+ 3\): run-0 got 2 tokens, expected 3"):
        measure(engine, BenchCase(2, 4, 3), 1, 0, num_token_ids=1000)


def test_spread() -> None:
    assert Spread.of(np.array([])) is None
    spread = Spread.of(np.arange(101.0))
    assert spread == Spread(median=50.0, p10=10.0, p90=90.0, least=0.0)


def test_an_engine_that_is_busy_otherwise() -> None:
    """Another request's tokens are not counted."""
    engine = _engine(max_num_seqs=8)
    engine.add(request("other", random_prompt(5, seed=1), 3))
    result = measure(engine, BenchCase(1, 4, 5), 1, 0, num_token_ids=1000, clock=_ticks())
    assert result.num_steps == 5
