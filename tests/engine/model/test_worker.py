"""However a model is split among ranks, its tokens are those of one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest
from rank_engine import Case, Generated, Tokens, generate
from ranks import rank_processes
from running import random_prompt, request, tiny_config, tiny_engine
from safetensors.torch import load_file, save_file
from tiny_glm import VARIANTS, make_checkpoint, make_predictable

from nybble.engine.checkpoint.quantize_checkpoint import quantize_checkpoint
from nybble.engine.checkpoint.quantize_recipe import QuantizeRecipe
from nybble.engine.engine_config import ParallelConfig, SpeculationConfig
from nybble.engine.messages import Request
from nybble.engine.planning.placement import Split
from nybble.engine.tokenizer import Tokenizer

TP2, EP2, PP2 = Split(2), Split(2, 2), Split(1, 1, 2)
TP3, EP3, PP3 = Split(3), Split(3, 3), Split(1, 1, 3)
TP4, EP4, PP4 = Split(4), Split(4, 4), Split(1, 1, 4)
TP2_PP2, EP2_PP2 = Split(2, 1, 2), Split(2, 2, 2)

OTHER_TINY = {
    "5 layers": {"num_hidden_layers": 5},  # PP 4: 2, 1, 1, 1
    "10 experts": {"n_routed_experts": 10},  # EP 4: 2, 3, 2, 3
    # NVFP4 needs whole blocks of 16 columns on each rank.
    "wide": {"intermediate_size": 128, "n_shared_experts": 2},
}
RUNS = [
    *((name, TP2) for name in VARIANTS),
    *((name, EP2) for name in ("glm-4.7-like", "groups")),
    *((name, PP2) for name in ("glm-4.7-like", "tied")),
    ("glm-4.7-like", PP3),
    *((name, TP4) for name in ("glm-4.7-like", "no-bias")),  # two ranks to a KV head
    ("10 experts", EP4),
    ("5 layers", PP4),
    *((name, TP2_PP2) for name in ("glm-4.7-like", "tied")),
    ("all-sparse", EP2_PP2),
    *(("nvfp4", split) for split in (TP2, EP4, EP2_PP2)),
    *(("draft", split) for split in (TP2, EP2, TP4)),
    *(("demo", split) for split in (PP2, TP3, EP3)),  # 9 heads, 3 KV heads, 16 experts
]


@pytest.fixture(scope="module")
def checkpoints(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for seed, (name, overrides) in enumerate((VARIANTS | OTHER_TINY).items()):
        make_checkpoint(root / name, seed, **overrides)
    make_checkpoint(root / "draft", num_mtp_layers=1)
    make_predictable(root / "draft")
    quantize_checkpoint(_rounded(root / "wide"), root / "nvfp4", QuantizeRecipe("nvfp4", "nvfp4"))
    return {name: demo_checkpoint if name == "demo" else root / name for name, _ in RUNS}


def _rounded(directory: Path) -> Path:
    """In BF16, as what is quantized must be."""
    file = directory / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    return directory


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path]) -> Callable[[str], Tokens]:
    """What one rank, in this process, generates."""

    @cache
    def tokens(name: str) -> Tokens:
        case = _case(checkpoints[name], Split())
        return generate(tiny_engine(case.config), case).tokens

    return tokens


@pytest.fixture(scope="module")
def together(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[tuple[str, Split], Generated]]:
    """What the runs of so many ranks generate: the same processes make one group after the other."""

    @cache
    def generated(num_ranks: int) -> dict[tuple[str, Split], Generated]:
        runs = [(name, split) for name, split in RUNS if split.num_ranks == num_ranks]
        directory = tmp_path_factory.mktemp("ranks")
        file = directory / "cases.json"
        file.write_bytes(msgspec.json.encode([_case(checkpoints[name], split) for name, split in runs]))
        with rank_processes("rank_engine.py", [[str(file)]] * num_ranks, directory, len(runs)) as ranks:
            output, *_ = [rank.finish() for rank in ranks]
        return dict(zip(runs, msgspec.json.decode(output, type=list[Generated]), strict=True))

    return generated


def _case(checkpoint: Path, split: Split) -> Case:
    parallel = ParallelConfig(
        tensor_parallel_size=split.tensor_parallel,
        pipeline_parallel_size=split.pipeline_parallel,
        enable_expert_parallel=split.expert_parallel > 1,
    )
    config = tiny_config(checkpoint, 0.05, max_num_seqs=8, max_num_batched_tokens=16)
    is_drafted = checkpoint.name == "draft" and split.num_ranks > 1
    speculation = SpeculationConfig(num_speculative_tokens=3 if is_drafted else 0)
    config = replace(config, parallel=parallel, max_model_len=256, speculation=speculation)
    return Case(config, _chats(checkpoint) if (checkpoint / "chat_template.jinja").exists() else _random())


def _random() -> tuple[tuple[Request, ...], ...]:
    """Prompts of one and several chunks; the second batch finds the start of the first in the cache."""
    prompts = [random_prompt(length, seed=length) for length in (1, 7, 16, 45)]
    first = [request(f"greedy {len(prompt)}", prompt, 24) for prompt in prompts]
    sampled = request("sampled", prompts[3], 24, temperature=1.0, seed=7)
    longer = request("longer", prompts[3] + prompts[1], 8)
    return (*first, sampled), (longer,)


def _chats(checkpoint: Path) -> tuple[tuple[Request, ...], ...]:
    tokenizer = Tokenizer(checkpoint)
    capital, count = (
        tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": question}]))
        for question in ("What is the capital of France?", "Count from one to ten.")
    )
    sampled = request("sampled", capital, 16, temperature=1.0, seed=7)
    return ((request("capital", capital, 16), request("count", count, 16), sampled),)


@pytest.mark.parametrize(("name", "split"), RUNS, ids=lambda value: str(value))
def test_tokens_of_one_rank(
    name: str,
    split: Split,
    alone: Callable[[str], Tokens],
    together: Callable[[int], dict[tuple[str, Split], Generated]],
) -> None:
    """Those of "draft" are drafted on several ranks, and not on one."""
    generated = together(split.num_ranks)[name, split]
    assert generated.tokens == alone(name)
    assert (generated.num_accepted > 0) == (name == "draft")
    assert sum(map(len, alone(name).values())) > 40  # not all ended at once
