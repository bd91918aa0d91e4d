"""Prefill and decode speed of the demo model on this machine, in one process, through the engine.

    .venv/bin/python benchmarks/demo_speed.py [--checkpoint DIRECTORY] [--repeat 5] [--deterministic]

Prints a Markdown table. Before any time is taken the model must name Paris; else there is none.
Prefill: one prompt of random tokens, its length over the time of its steps. Decode: after a short prompt,
tokens per second of all requests together, first tokens excluded. Median (min .. max) of the repeats.
"""

from __future__ import annotations

import os

from nybble.engine.ranks.tuning import TUNING

os.environ.update(TUNING | os.environ)  # before torch is imported

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nybble.engine.engine import Engine
from nybble.engine.engine_config import CacheConfig, EngineConfig
from nybble.engine.loading import load_engine, prepare
from nybble.engine.machine import processor_name
from nybble.engine.messages import Request, SamplingParams
from nybble.engine.tokenizer import Tokenizer

PREFILL_LENGTHS = (128, 512, 2048)
BATCHES = (1, 8, 32)
NUM_DECODED = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", default="build/demo-checkpoint")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--deterministic", action="store_true")
    options = parser.parse_args()
    # Without the prefix cache: a repeat must do all the work again.
    cache = CacheConfig(kv_cache_memory=2.0, enable_prefix_caching=False)
    config = EngineConfig(checkpoint=options.checkpoint, cache=cache, deterministic=options.deterministic)
    engine = load_engine(prepare(config))
    _check(engine, Tokenizer(Path(options.checkpoint)))
    print(f"{processor_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | tokens/s, median (min .. max) |\n| --- | --- |")
    for length in PREFILL_LENGTHS:
        rate = _summary(lambda n=length: _prefill(engine, n), options.repeat)
        print(f"| prefill, {length} tokens | {rate} |")
    for batch in BATCHES:
        rate = _summary(lambda n=batch: _decode(engine, n), options.repeat)
        print(f"| decode, {batch} at once | {rate} |")


def _check(engine: Engine, tokenizer: Tokenizer) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    engine.add(_request("check", tokenizer.encode(tokenizer.render_chat(question)), 12))
    answer = b""
    while engine.has_work:
        answer += b"".join(tokenizer.token_bytes(event.token_id) for event in engine.step())
    if b"Paris" not in answer:
        sys.exit(f"the model answers {answer!r}: no speed is reported of a wrong model")


def _prefill(engine: Engine, length: int) -> float:
    engine.add(_request("a", _random_prompt(length), 1))
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return length / (time.perf_counter() - start)


def _decode(engine: Engine, batch: int) -> float:
    for number in range(batch):
        engine.add(_request(str(number), _random_prompt(16), NUM_DECODED + 1))
    engine.step()  # all prompts fit in one step, which gives the first tokens
    start, count = time.perf_counter(), 0
    while engine.has_work:
        count += len(engine.step())
    return count / (time.perf_counter() - start)


def _request(request_id: str, prompt: tuple[int, ...], max_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)


def _random_prompt(length: int) -> tuple[int, ...]:
    return tuple(random.randrange(20, 49000) for _ in range(length))


def _summary(measure: Callable[[], float], repeat: int) -> str:
    rates = [measure() for _ in range(repeat + 1)][1:]  # the first warms up
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} .. {max(rates):.1f})"


if __name__ == "__main__":
    main()
