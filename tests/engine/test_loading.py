"""Engines as they are loaded for `--deterministic`: a request's tokens and log-probabilities, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest
import torch
from rank_engine import Case, Generated, Tokens, generate
from ranks import rank_processes
from running import TINY_CACHE_GIB, random_prompt, request, run, tiny_config, tiny_engine
from scripted_drafter import ScriptedDrafter
from tiny_glm import make_checkpoint

from nybble.engine.backend import Backend
from nybble.engine.engine import Engine
from nybble.engine.engine_config import EngineConfig, ParallelConfig, SpeculationConfig
from nybble.engine.loading import load_engine, prepare
from nybble.engine.messages import Request, TokenEvent
from nybble.engine.planning.inventory import KVDtype
from nybble.engine.planning.placement import Split

SAMPLED = {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "frequency_penalty": 0.3}
SPLITS = [Split(2), Split(4), Split(1, 1, 2)]
Bits = list[tuple[int, object]]  # of a request: each token, and log-probabilities


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These products are too small to be worth two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its widths are no multiples of a vector's."""
    directory = tmp_path_factory.mktemp("glm")
    sizes = {"n_routed_experts": 12, "moe_intermediate_size": 18, "intermediate_size": 50}
    make_checkpoint(directory, seed=12, **sizes)
    return directory


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranked")
    make_checkpoint(directory, seed=13)
    return directory


@pytest.fixture(scope="module", params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


def config(
    checkpoint: Path, memory: float = TINY_CACHE_GIB, *, backend: Backend = "reference", **scheduler: int
) -> EngineConfig:
    return replace(tiny_config(checkpoint, memory, **scheduler), deterministic=True, backend=backend)


def requests(count: int = 8) -> list[Request]:
    """Greedy and sampled in turn. Two are of several chunks and blocks."""
    return [
        request(
            str(n),
            random_prompt(75 if n < 2 else 10 + n, seed=n),
            8,
            **({"num_logprobs": 2, "seed": n} | (SAMPLED if n % 2 else {})),
        )
        for n in range(count)
    ]


def replace_tokens(item: Request, max_tokens: int) -> Request:
    sampling = msgspec.structs.replace(item.sampling, max_tokens=max_tokens)
    return msgspec.structs.replace(item, sampling=sampling)


def bits(events: Sequence[TokenEvent]) -> Bits:
    return [(event.token_id, event.logprobs) for event in events]


def answers(engine: Engine, asked: Sequence[Request]) -> dict[str, Bits]:
    return {request_id: bits(events) for request_id, events in run(engine, *asked).items()}


def one_by_one(config: EngineConfig, asked: Sequence[Request]) -> dict[str, Bits]:
    """Each on its own, without any cache."""
    alone: dict[str, Bits] = {}
    config = replace(config, cache=replace(config.cache, enable_prefix_caching=False))
    engine = tiny_engine(config)
    for item in asked:
        alone |= answers(engine, [item])
    return alone


@pytest.fixture(scope="module")
def alone(checkpoint: Path, backend: Backend) -> dict[str, Bits]:
    return one_by_one(config(checkpoint, backend=backend), requests(32))


def test_beside_31_others(checkpoint: Path, backend: Backend, alone: dict[str, Bits]) -> None:
    assert answers(tiny_engine(config(checkpoint, backend=backend)), requests(32)) == alone


def test_without_it_bits_differ(checkpoint: Path) -> None:
    """Or there would be nothing to promise."""
    plain = tiny_config(checkpoint)
    assert answers(tiny_engine(plain), requests()) != one_by_one(plain, requests())


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_in_chunks(checkpoint: Path, backend: Backend, alone: dict[str, Bits], budget: int) -> None:
    """A budget of 1 feeds a prompt token by token, as if decoded; the others mix prefill with decode."""
    chunked = config(checkpoint, backend=backend, max_num_batched_tokens=budget, max_num_seqs=min(budget, 5))
    asked = requests(1 if budget == 1 else 8)
    assert answers(tiny_engine(chunked), asked) == {item.request_id: alone[item.request_id] for item in asked}


def test_recorded_steps_have_the_bits_of_others(checkpoint: Path) -> None:
    """Batches shrink and contexts grow over their blocks while recordings are repeated."""
    recorded = config(checkpoint, backend="cpu")
    asked = [replace_tokens(item, 5 + 4 * n) for n, item in enumerate(requests(8))]
    engine = tiny_engine(recorded)
    found = answers(engine, asked)
    assert found == answers(tiny_engine(replace(recorded, enforce_eager=True)), asked)
    assert answers(engine, asked) == found


def test_preempted(checkpoint: Path, backend: Backend) -> None:
    memory = {"reference": 0.0002, "cpu": 0.0001}[backend]  # of float32 and of bfloat16
    small = replace(config(checkpoint, memory, backend=backend), max_model_len=100)
    asked = [request(str(n), random_prompt(17, seed=n), 24, num_logprobs=1) for n in range(8)]
    engine = tiny_engine(small)
    found = answers(engine, asked)
    assert engine.stats().num_preemptions > 0, "the pool is too large for this test"
    assert found == one_by_one(small, asked)


def test_cached(checkpoint: Path, backend: Backend, alone: dict[str, Bits]) -> None:
    engine = tiny_engine(config(checkpoint, backend=backend))
    for _ in range(2):
        results = run(engine, *requests(8))
        assert {name: bits(events) for name, events in results.items()} == {
            name: alone[name] for name in results
        }
    assert [results[name][0].num_cached_tokens for name in ("0", "1", "7")] == [64, 64, 16]


def test_with_drafts(tmp_path: Path, backend: Backend) -> None:
    """Several tokens of a sequence in one step have the bits of one by one, accepted or not."""
    make_checkpoint(tmp_path, seed=14, num_mtp_layers=1)
    options = config(tmp_path, backend=backend)
    asked = requests(4)
    plain = one_by_one(options, asked)
    tokens_of = {name: [token for token, _ in found] for name, found in plain.items()}
    drafting = replace(options, speculation=SpeculationConfig(num_speculative_tokens=4))
    engine = load_engine(prepare(drafting), ScriptedDrafter("mixed", asked, tokens_of))
    assert answers(engine, asked) == plain
    stats = engine.stats().speculation
    assert stats is not None and 0 < sum(stats.num_accepted) < sum(stats.num_drafts)


@pytest.mark.parametrize("kv_cache_dtype", ["fp32", "fp8"])
def test_native_code_from_small_caches(checkpoint: Path, kv_cache_dtype: KVDtype) -> None:
    plain = config(checkpoint, backend="cpu", max_num_batched_tokens=33, max_num_seqs=8)
    small = replace(plain, cache=replace(plain.cache, kv_cache_dtype=kv_cache_dtype))
    assert answers(tiny_engine(small), requests(4)) == one_by_one(small, requests(4))


@pytest.mark.parametrize("kv_cache_dtype", ["bf16", "fp8"])
def test_in_bfloat16_and_from_small_caches(checkpoint: Path, kv_cache_dtype: str) -> None:
    plain = config(checkpoint, max_num_batched_tokens=33, max_num_seqs=8)
    small = replace(plain, dtype="bfloat16", cache=replace(plain.cache, kv_cache_dtype=kv_cache_dtype))
    assert answers(tiny_engine(small), requests(4)) == one_by_one(small, requests(4))


# Several ranks.


@pytest.fixture(scope="module")
def split_runs(ranked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Split, Tokens]:
    """Of each split the tokens of requests together, and of each again on its own."""

    @cache
    def runs(num_ranks: int) -> dict[Split, Tokens]:
        splits = [split for split in SPLITS if split.num_ranks == num_ranks]
        directory = tmp_path_factory.mktemp("ranks")
        file = directory / "cases.json"
        file.write_bytes(msgspec.json.encode([_case(ranked, split) for split in splits]))
        with rank_processes("rank_engine.py", [[str(file)]] * num_ranks, directory, len(splits)) as ranks:
            output, *_ = [rank.finish() for rank in ranks]
        found = msgspec.json.decode(output, type=list[Generated])
        return {split: generated.tokens for split, generated in zip(splits, found, strict=True)}

    return {split: found for num_ranks in (2, 4) for split, found in runs(num_ranks).items()}


def _case(checkpoint: Path, split: Split) -> Case:
    parallel = ParallelConfig(
        tensor_parallel_size=split.tensor_parallel, pipeline_parallel_size=split.pipeline_parallel
    )
    again = [(_again(item),) for item in requests(4)]
    options = replace(config(checkpoint, max_num_batched_tokens=40, max_num_seqs=8), parallel=parallel)
    options = replace(options, cache=replace(options.cache, enable_prefix_caching=False))
    return Case(options, (tuple(requests(4)), *again))


def _again(item: Request) -> Request:
    return msgspec.structs.replace(item, request_id=f"{item.request_id} again")


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_on_several_ranks(split: Split, split_runs: dict[Split, Tokens]) -> None:
    found = split_runs[split]
    for item in requests(4):
        assert found[item.request_id] == found[f"{item.request_id} again"]


def test_native_code_on_two_ranks(ranked: Path, tmp_path: Path) -> None:
    case = _case(ranked, Split(2))
    file = tmp_path / "cases.json"
    file.write_bytes(msgspec.json.encode([Case(replace(case.config, backend="cpu"), case.batches)]))
    with rank_processes("rank_engine.py", [[str(file)]] * 2, tmp_path, 1) as ranks:
        output, *_ = [rank.finish() for rank in ranks]
    (found,) = msgspec.json.decode(output, type=list[Generated])
    assert all(
        found.tokens[item.request_id] == found.tokens[f"{item.request_id} again"] for item in requests(4)
    )


def test_pipeline_stages_give_the_tokens_of_one_rank(ranked: Path, split_runs: dict[Split, Tokens]) -> None:
    """They add nothing up. Tensor-parallel ranks do, in another order than one rank."""
    case = _case(ranked, Split())
    assert split_runs[Split(1, 1, 2)] == generate(tiny_engine(case.config), case).tokens
