"""What `--deterministic` costs on the demo model: processor time with it over that without, on one thread.

    .venv/bin/python benchmarks/deterministic_cost.py [--checkpoint build/demo-checkpoint] [--repeat 3]

Prints a Markdown table. The two engines take turns in one process, with the same prompts, so that what else
the machine does hits both.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from nybble.engine.engine import Engine
from nybble.engine.engine_config import CacheConfig, EngineConfig
from nybble.engine.loading import load_engine, prepare
from nybble.engine.messages import Request, SamplingParams

# Requests at once, tokens of each prompt, tokens of each answer.
CASES = {
    "prefill, 128 tokens": (1, 128, 1),
    "prefill, 512 tokens": (1, 512, 1),
    "decode, 1 at once": (1, 8, 17),
    "decode, 8 at once": (8, 8, 9),
    "decode, 32 at once": (32, 8, 9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", default="build/demo-checkpoint")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache = CacheConfig(kv_cache_memory=0.5, enable_prefix_caching=False)
    plain = EngineConfig(checkpoint=options.checkpoint, cache=cache)
    deterministic = EngineConfig(checkpoint=options.checkpoint, cache=cache, deterministic=True)
    engines = [load_engine(prepare(config)) for config in (plain, deterministic)]
    for engine in engines:  # matrices of every shape are tried when they are first met
        _seconds(engine, 1, 100, 2)
    print("| what | times as long |\n| --- | --- |")
    for name, case in CASES.items():
        ratios = []
        for _ in range(options.repeat):
            without, within = (_seconds(engine, *case) for engine in engines)
            ratios.append(within / without)
        print(f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) |")


def _seconds(engine: Engine, num_requests: int, prompt_length: int, answer_length: int) -> float:
    """Of processor time, for random prompts, the same ones every time."""
    sampling = SamplingParams(max_tokens=answer_length, temperature=0.0)
    for number in range(num_requests):
        numbers = random.Random(number)
        prompt = tuple(numbers.randrange(20, 49000) for _ in range(prompt_length))
        engine.add(Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
    start = time.process_time()
    while engine.has_work:
        engine.step()
    return time.process_time() - start


if __name__ == "__main__":
    main()
