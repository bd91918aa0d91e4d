from __future__ import annotations

from dataclasses import replace

import pytest
from running import tiny_config
from tiny_glm import make_checkpoint

from nybble.engine.bench_target import BenchTarget, null_target, num_cache_tokens, rank_target
from nybble.engine.engine_bench import BenchCase, measure
from nybble.engine.engine_config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from nybble.engine.errors import OptionError
from nybble.engine.model.null_model import NULL_MODEL
from nybble.engine.ranks.start import start_rank

CONFIG = EngineConfig(checkpoint=NULL_MODEL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BenchTarget:
    directory = tmp_path_factory.mktemp("glm")
    make_checkpoint(directory, seed=3)
    return rank_target(start_rank(tiny_config(directory)))


def test_the_null_model_has_room_for_its_largest_case_exactly() -> None:
    cases = [BenchCase(4, 15, 2), BenchCase(2, 100, 4)]
    target = null_target(CONFIG, cases)
    assert target.num_cache_tokens == 2 * (7 + 1) * 16
    for case in cases:
        target.check(case)
        result = measure(target.make_engine(case.batch), case, 1, num_token_ids=100)
        assert result.stats.num_preemptions == 0
        assert result.num_steps == case.output_length  # all run at once
    with pytest.raises(OptionError, match=r"needs a KV cache of 320 tokens, but it has 256"):
        target.check(BenchCase(5, 40, 4))


def test_at_most_so_many_run_at_once() -> None:
    engine = null_target(CONFIG, [BenchCase(8, 4, 4)]).make_engine(2)
    assert measure(engine, BenchCase(8, 4, 4), 1, num_token_ids=100).num_steps == 16


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (BenchCase(1, 90, 11), "101 tokens exceed max_model_len = 100"),
        (BenchCase(9, 4, 4), "max_num_batched_tokens is 8, expected at least one"),
    ],
)
def test_cases_that_cannot_be_run(case: BenchCase, message: str) -> None:
    config = replace(CONFIG, max_model_len=100, scheduler=SchedulerConfig(max_num_batched_tokens=8))
    with pytest.raises(OptionError, match=message):
        null_target(config, [case]).check(case)


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, parallel=ParallelConfig(tensor_parallel_size=2)),
        replace(CONFIG, cache=CacheConfig(block_size=0)),
    ],
)
def test_options_that_the_null_model_has_not(config: EngineConfig) -> None:
    with pytest.raises(OptionError):
        null_target(config, [BenchCase(1, 1, 1)])


def test_a_checkpoint(tiny: BenchTarget) -> None:
    case = BenchCase(3, 20, 4)
    tiny.check(case)
    result = measure(tiny.make_engine(3), case, 1, num_token_ids=tiny.num_token_ids)
    assert result.num_steps == 4 and result.prefill_tokens_per_s > 0
    assert tiny.num_cache_tokens % 16 == 0 and tiny.num_token_ids == 160


def test_num_cache_tokens_counts_whole_blocks_and_one_to_grow_into() -> None:
    assert num_cache_tokens(BenchCase(3, 15, 1), 16) == 3 * 2 * 16
    assert num_cache_tokens(BenchCase(3, 16, 1), 16) == 3 * 3 * 16
