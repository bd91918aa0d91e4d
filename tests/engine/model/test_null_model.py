from __future__ import annotations

import time

from running import random_prompt, request, run, tokens

from nybble.engine.channel import encode_frame
from nybble.engine.engine import Engine
from nybble.engine.engine_config import EngineConfig, SchedulerConfig
from nybble.engine.model.null_model import NULL_MODEL, null_engine


def _engine(num_blocks: int = 64, **scheduler: int) -> Engine:
    config = EngineConfig(checkpoint=NULL_MODEL, scheduler=SchedulerConfig(**scheduler))
    return null_engine(config, num_blocks)


def test_every_request_gets_its_tokens() -> None:
    lengths = {"a": (1, 5), "b": (40, 1), "c": (100, 20)}
    requests = [request(name, random_prompt(n, seed=n), count) for name, (n, count) in lengths.items()]
    events = run(_engine(max_num_batched_tokens=64), *requests)
    assert {name: tokens(own) for name, own in events.items()} == {
        name: [0] * count for name, (_, count) in lengths.items()
    }
    assert all(own[-1].finish_reason == "length" for own in events.values())


def test_scheduler_and_block_pool_do_their_work() -> None:
    engine = _engine(num_blocks=8, max_num_seqs=4)
    requests = [request(str(n), random_prompt(30, seed=n), 40) for n in range(4)]
    events = run(engine, *requests)
    assert engine.stats().num_preemptions > 0
    assert all(len(own) == 40 for own in events.values())


def test_prefixes_are_cached() -> None:
    engine = _engine()
    run(engine, request("a", random_prompt(48, seed=1)))
    events = run(engine, request("b", random_prompt(48, seed=1)))["b"]
    assert events[0].num_cached_tokens == 32


def test_sampling_parameters_are_gathered() -> None:
    """Bookkeeping of sampling runs, whatever it is asked for."""
    sampled = request("a", (1, 2), 4, temperature=0.7, top_p=0.9, top_k=5, seed=3, num_logprobs=2)
    events = run(_engine(), sampled)["a"]
    assert [len(event.logprobs.top) for event in events if event.logprobs] == [2] * 4


# What a step costs the host. The least of many steps, under bounds far above what was measured, since the
# machine has other work too.


def _least_step_seconds(engine: Engine, num_steps: int) -> float:
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        encode_frame(engine.step())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _busy_engine(num_running: int, num_queued: int) -> Engine:
    """One whose running requests decode."""
    engine = _engine(num_blocks=num_running * 20, max_num_seqs=num_running, max_num_batched_tokens=8192)
    for number in range(num_running + num_queued):
        engine.add(request(str(number), (1, 2, 3, number), 300, temperature=1.0, seed=number))
    engine.step()
    assert engine.stats().num_running == num_running
    return engine


def test_a_step_of_256_sequences() -> None:
    """Measured: 1.3 ms."""
    assert _least_step_seconds(_busy_engine(256, 0), 60) < 0.008


def test_a_queue_does_not_slow_a_step() -> None:
    """Measured: 0.16 ms with and without."""
    assert _least_step_seconds(_busy_engine(8, 20_000), 60) < 0.001
