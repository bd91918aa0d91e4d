"""Run an in-process engine over tiny checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nybble.engine.engine import Engine
from nybble.engine.engine_config import CacheConfig, EngineConfig, SchedulerConfig
from nybble.engine.loading import load_engine, prepare
from nybble.engine.messages import Request, SamplingParams, TokenEvent

TINY_CACHE_GIB = 0.02


def tiny_config(directory: Path, kv_cache_memory: float = TINY_CACHE_GIB, **scheduler: int) -> EngineConfig:
    """On the reference, whose tokens are transformers'."""
    return EngineConfig(
        checkpoint=str(directory),
        backend="reference",
        device="cpu",
        cache=CacheConfig(kv_cache_memory=kv_cache_memory),
        scheduler=SchedulerConfig(**{"max_waiting": None} | scheduler),
    )


def tiny_engine(config: EngineConfig) -> Engine:
    return load_engine(prepare(config))


def random_prompt(length: int, seed: int, vocab_size: int = 160) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, vocab_size, (length,), generator=generator).tolist())


def request(request_id: str, prompt: Sequence[int], max_tokens: int = 16, **sampling: Any) -> Request:
    """Greedy unless told otherwise."""
    params = SamplingParams(max_tokens=max_tokens, **({"temperature": 0.0} | sampling))
    return Request(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=params)


def run(engine: Engine, *requests: Request) -> dict[str, list[TokenEvent]]:
    """Run requests to their end; each one's events. Checks the block pool after every step."""
    for item in requests:
        engine.add(item)
    events: dict[str, list[TokenEvent]] = {item.request_id: [] for item in requests}
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
        engine.check()
    return events


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]
