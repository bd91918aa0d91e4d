"""Perplexity of a text under backends for CPUs and KV cache dtypes, through the model as the engine runs it.

    .venv/bin/python benchmarks/perplexity.py [--checkpoint build/demo-checkpoint] [--text LICENSE ...]

Prints a Markdown table: perplexity over the first tokens of each text, and how often the most likely token is
that of the first row. Every token is given the true ones before it; each chunk of a text reads the cache that
the earlier ones wrote.
"""

from __future__ import annotations

import os

from nybble.engine.ranks.tuning import TUNING

os.environ.update(TUNING | os.environ)  # before torch is imported

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from nybble.kernels.cpu.cores import default_num_threads
from nybble.kernels.cpu.cpu_ops import CpuOps
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.ops import KVCacheLayer, Ops
from nybble.kernels.reference_ops import ReferenceOps

CHUNK, BLOCK_SIZE = 128, 16
CPU = torch.device("cpu")


# Of texts, with a KV cache of a dtype: the loss, float64, of each token but a text's first, and the likeliest
# token at each.
Run = Callable[[KVDtype, Sequence[list[int]]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A backend, in words, with KV cache dtypes to run it with."""

    backend: str
    ops: Ops[Any]
    kv_dtypes: tuple[KVDtype, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/demo-checkpoint"))
    parser.add_argument("--text", type=Path, nargs="+", default=[Path("LICENSE")])
    parser.add_argument("--num-tokens", type=int, default=2048, help="of each text")
    options = parser.parse_args()
    tokenizer = Tokenizer(options.checkpoint)
    texts = [tokenizer.encode(path.read_text())[: options.num_tokens] for path in options.text]
    names = ", ".join(path.name for path in options.text)
    print(f"{sum(map(len, texts))} tokens of {names}\n")
    print("| backend | KV cache | perplexity | most likely token as in row 1 |\n| --- | --- | --- | --- |")
    first: Tensor | None = None
    for case in _cases():
        run = _load(options.checkpoint, case.ops)
        for dtype in case.kv_dtypes:
            losses, likeliest = run(dtype, texts)
            first = likeliest if first is None else first
            perplexity, agreement = losses.mean().exp(), (likeliest == first).double().mean()
            row = case.backend, dtype, f"{float(perplexity):.3f}", f"{float(agreement):.1%}"
            print(f"| {' | '.join(row)} |", flush=True)


def _cases() -> Iterator[Case]:
    yield Case("reference", ReferenceOps(torch.float32), ("fp32", "bf16", "fp8"))
    pool = Pool(default_num_threads())
    yield Case("cpu", CpuOps(pool), ("fp32", "bf16", "fp8"))
    yield Case("cpu, other matrices in bf16 instead of int8", CpuOps(pool, "bf16"), ("fp32",))


def _load(directory: Path, ops: Ops[Any]) -> Run:
    config, checkpoint = check_structure(directory)
    model = Glm4Moe(config, load_weights(checkpoint, config, ops, CPU, torch.float32), ops, CPU)
    scales = read_kv_scales(checkpoint, range(config.num_hidden_layers))

    def run(dtype: KVDtype, texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        losses, likeliest = [], []
        for token_ids in texts:
            num_blocks = -(-len(token_ids) // BLOCK_SIZE)
            shape = KV_TORCH_DTYPES[dtype], BLOCK_SIZE, num_blocks
            cache = allocate_kv_cache(CacheGeometry.of(config, Placement(), *shape), ops, CPU, scales)
            logits = torch.cat(list(_logits(model, cache, token_ids)))
            targets = torch.tensor(token_ids[1:])
            losses.append(torch.nn.functional.cross_entropy(logits[:-1].double(), targets, reduction="none"))
            likeliest.append(logits.argmax(-1))
        return torch.cat(losses), torch.cat(likeliest)

    return run


@torch.inference_mode()
def _logits(model: Glm4Moe[Any], cache: tuple[KVCacheLayer, ...], token_ids: list[int]) -> Iterator[Tensor]:
    blocks = range(-(-len(token_ids) // BLOCK_SIZE))
    for start in range(0, len(token_ids), CHUNK):
        chunk = Chunk("text", token_ids[start : start + CHUNK], start, blocks, SamplingParams(max_tokens=1))
        step = build_step_input(StepPlan((chunk,)), BLOCK_SIZE)
        hidden = model.embed(step.token_ids)
        yield model.logits(model.forward(hidden, step.positions, cache, step.attention))


if __name__ == "__main__":
    main()
