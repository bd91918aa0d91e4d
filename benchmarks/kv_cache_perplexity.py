"""Perplexity of a text under each KV cache dtype, through the model as the engine runs it, on this machine.

    .venv/bin/python benchmarks/kv_cache_perplexity.py [--checkpoint build/demo-checkpoint] [--text LICENSE]

Prints a Markdown table: perplexity over the text's first tokens, and how often the most likely token is that
of the first dtype. Every token is given the true ones before it; each chunk of the text reads the cache that
the earlier ones wrote.
"""

from __future__ import annotations

import os

from nybble.engine.ranks.tuning import TUNING

os.environ.update(TUNING | os.environ)  # before torch is imported

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nybble.engine.checkpoint.kv_scales import read_kv_scales
from nybble.engine.checkpoint.verify_checkpoint import check_structure
from nybble.engine.messages import SamplingParams
from nybble.engine.model.kv_cache import KV_TORCH_DTYPES, CacheGeometry, allocate_kv_cache
from nybble.engine.model.model import Glm4Moe
from nybble.engine.model.weights import load_weights
from nybble.engine.planning.inventory import KVDtype
from nybble.engine.planning.placement import Placement
from nybble.engine.scheduling.step import Chunk, StepPlan, build_step_input
from nybble.engine.tokenizer import Tokenizer
from nybble.kernels.ops import KVCacheLayer
from nybble.kernels.reference_ops import ReferenceOps

DTYPES: tuple[KVDtype, ...] = ("fp32", "bf16", "fp8")
CHUNK, BLOCK_SIZE = 128, 16
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/demo-checkpoint"))
    parser.add_argument("--text", type=Path, default=Path("LICENSE"))
    parser.add_argument("--num-tokens", type=int, default=2048)
    options = parser.parse_args()
    token_ids = Tokenizer(options.checkpoint).encode(options.text.read_text())[: options.num_tokens]
    config, checkpoint = check_structure(options.checkpoint)
    ops = ReferenceOps(torch.float32)
    model = Glm4Moe(config, load_weights(checkpoint, config, ops, CPU, torch.float32), ops, CPU)
    scales = read_kv_scales(checkpoint, range(config.num_hidden_layers))
    print(f"{len(token_ids)} tokens of {options.text}\n")
    print(f"| KV cache | perplexity | most likely token as in {DTYPES[0]} |\n| --- | --- | --- |")
    first: Tensor | None = None
    for dtype in DTYPES:
        num_blocks = -(-len(token_ids) // BLOCK_SIZE)
        geometry = CacheGeometry.of(config, Placement(), KV_TORCH_DTYPES[dtype], BLOCK_SIZE, num_blocks)
        cache = allocate_kv_cache(geometry, ops, CPU, scales)
        logits = torch.cat(list(_logits(model, cache, token_ids)))
        loss = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(token_ids[1:]))
        first = logits.argmax(-1) if first is None else first
        agreement = (logits.argmax(-1) == first).double().mean()
        print(f"| {dtype} | {float(loss.exp()):.3f} | {float(agreement):.1%} |")


@torch.inference_mode()
def _logits(
    model: Glm4Moe[Tensor], cache: tuple[KVCacheLayer, ...], token_ids: list[int]
) -> Iterator[Tensor]:
    blocks = range(-(-len(token_ids) // BLOCK_SIZE))
    for start in range(0, len(token_ids), CHUNK):
        chunk = Chunk("text", token_ids[start : start + CHUNK], start, blocks, SamplingParams(max_tokens=1))
        step = build_step_input(StepPlan((chunk,)), BLOCK_SIZE)
        hidden = model.embed(step.token_ids)
        yield model.logits(model.forward(hidden, step.positions, cache, step.attention))


if __name__ == "__main__":
    main()
