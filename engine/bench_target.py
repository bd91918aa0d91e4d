"""What `nybble bench engine` measures: the null model, or a checkpoint on this rank and the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nybble.engine.engine import Engine
from nybble.engine.engine_bench import BenchCase
from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import OptionError
from nybble.engine.loading import build_engine
from nybble.engine.model.null_model import MAX_MODEL_LEN, NULL_MODEL, VOCAB_SIZE, null_engine
from nybble.engine.ranks.start import StartedRank


@dataclass(frozen=True)
class BenchTarget:
    """make_engine: an idle engine that runs at most so many requests at once; one is used at a time.
    close: to be called at the end. num_cache_tokens: what the KV cache holds."""

    config: EngineConfig
    make_engine: Callable[[int], Engine]
    close: Callable[[], None]
    num_token_ids: int
    max_model_len: int
    num_cache_tokens: int

    def check(self, case: BenchCase) -> None:
        """Raises OptionError unless the case fits, without preemption."""
        config = self.config
        if case.length > self.max_model_len:
            raise OptionError(f"{case}: {case.length} tokens exceed max_model_len = {self.max_model_len}")
        if case.batch > config.scheduler.max_num_batched_tokens:
            raise OptionError(
                f"{case}: max_num_batched_tokens is {config.scheduler.max_num_batched_tokens}, expected at "
                "least one for each request"
            )
        needed = num_cache_tokens(case, config.cache.block_size)
        if needed > self.num_cache_tokens:
            raise OptionError(
                f"{case}: needs a KV cache of {needed} tokens, but it has {self.num_cache_tokens}: raise "
                "kv_cache_memory or measure less at once"
            )


def null_target(config: EngineConfig, cases: Sequence[BenchCase]) -> BenchTarget:
    """The null model, with as many blocks as the largest case needs.

    Raises:
        OptionError: the options call for something that it has not.
    """
    if config.parallel.split.num_ranks > 1:
        raise OptionError(f"the model {NULL_MODEL!r} runs on one rank")
    block_size = config.cache.block_size
    if block_size < 1:
        raise OptionError(f"block_size is {block_size}, expected at least 1")
    num_tokens = max(num_cache_tokens(case, block_size) for case in cases)

    def make_engine(max_num_seqs: int) -> Engine:
        return null_engine(_with_max_num_seqs(config, max_num_seqs), num_tokens // block_size)

    max_model_len = config.max_model_len or MAX_MODEL_LEN
    return BenchTarget(config, make_engine, lambda: None, VOCAB_SIZE, max_model_len, num_tokens)


def rank_target(rank: StartedRank) -> BenchTarget:
    """The model of a started rank 0."""
    preparation, geometry = rank.preparation, rank.preparation.memory.cache_geometry

    def make_engine(max_num_seqs: int) -> Engine:
        config = _with_max_num_seqs(preparation.config, max_num_seqs)
        return build_engine(replace(preparation, config=config), rank.worker, rank.group)

    def close() -> None:
        rank.group.announce_end()
        rank.group.close()

    limits = preparation.limits
    num_tokens = geometry.num_blocks * geometry.block_size
    return BenchTarget(
        preparation.config, make_engine, close, limits.num_token_ids, limits.max_model_len, num_tokens
    )


def num_cache_tokens(case: BenchCase, block_size: int) -> int:
    """Of the blocks that a case fills, and one more a sequence, without which the scheduler admits none."""
    return case.batch * (-(-case.length // block_size) + 1) * block_size


def _with_max_num_seqs(config: EngineConfig, max_num_seqs: int) -> EngineConfig:
    return replace(config, scheduler=replace(config.scheduler, max_num_seqs=max_num_seqs))
