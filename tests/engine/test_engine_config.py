from __future__ import annotations

from dataclasses import fields

import pytest

from nybble.engine.checkpoint.weight_dtypes import WeightDtypes
from nybble.engine.engine_config import (
    CacheConfig,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from nybble.engine.errors import OptionError
from nybble.engine.planning.placement import Split


@pytest.mark.parametrize(
    "kind", [CacheConfig, SchedulerConfig, ParallelConfig, SpeculationConfig, WeightDtypes, EngineConfig]
)
def test_every_option_has_a_help_text(kind: type) -> None:
    helpless = [f.name for f in fields(kind) if not f.metadata.get("help")]
    assert helpless == (
        ["weights", "parallel", "cache", "scheduler", "speculation"] if kind is EngineConfig else []
    )


@pytest.mark.parametrize(
    ("config", "split"),
    [
        (ParallelConfig(), Split(1, 1, 1)),
        (ParallelConfig(tensor_parallel_size=8), Split(8, 1, 1)),
        (ParallelConfig(tensor_parallel_size=8, enable_expert_parallel=True), Split(8, 8, 1)),
        (ParallelConfig(tensor_parallel_size=4, pipeline_parallel_size=3), Split(4, 1, 3)),
        (ParallelConfig(pipeline_parallel_size=3, enable_expert_parallel=True), Split(1, 1, 3)),
    ],
    ids=str,
)
def test_sizes_make_a_split(config: ParallelConfig, split: Split) -> None:
    assert config.split == split


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_named(size: int) -> None:
    with pytest.raises(OptionError, match=f"tensor_parallel_size is {size}, expected at least 1"):
        _ = ParallelConfig(tensor_parallel_size=size).split
    with pytest.raises(OptionError, match=f"pipeline_parallel_size is {size}, expected at least 1"):
        _ = ParallelConfig(pipeline_parallel_size=size).split
