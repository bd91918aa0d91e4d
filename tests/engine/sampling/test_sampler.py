from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import assert_close
from msgspec.structs import replace
from sampling_oracle import adjusted_logits, assert_distributed, token_distribution
from torch import Tensor
from triton_device import ARCHES, DEVICE

from nybble.engine.messages import SamplingParams, TokenLogprobs
from nybble.engine.sampling.logit_rules import logit_rules
from nybble.engine.sampling.sampler import Sampler
from nybble.engine.scheduling.step import Chunk, SampledToken
from nybble.kernels.logit_adjustments import LogitAdjustments
from nybble.kernels.ops import Ops, SamplingBatch
from nybble.kernels.random_bits import draw_bits
from nybble.kernels.reference_ops import ReferenceOps
from nybble.kernels.token_logprobs import Logprobs
from nybble.kernels.triton.triton_ops import TritonOps


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    with DEVICE:
        yield


def _chunk(
    start: int = 0,
    count: int = 1,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    num_tokens: int = 40,
    **sampling: Any,
) -> Chunk:
    """The last `count` tokens of a request whose prompt and output are as its rules know them."""
    params = SamplingParams(**({"max_tokens": 99, "seed": 0} | sampling))
    rules = logit_rules(prompt, params, num_tokens)
    for token_id in output if rules is not None else ():
        rules.append(token_id)
    return Chunk("r", [1] * count, start, [0], params, rules=rules)


def _logits(rows: int, columns: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator, device="cpu").to(DEVICE) * 2


def _sample(
    logits: Tensor,
    chunks: list[Chunk],
    num_token_ids: int = 1000,
    ops: Ops[Any] | None = None,
) -> list[SampledToken]:
    """Of chunks without drafts."""
    sampler = Sampler(ops or ReferenceOps(torch.float32), num_token_ids)
    return [token for (token,) in sampler.sample(logits.clone(), chunks).tokens()]


class _RecordingOps(ReferenceOps):
    """Keeps the batch that it was asked to sample."""

    batch: SamplingBatch

    def sample(self, logits: Tensor, batch: SamplingBatch, num_token_ids: int) -> Tensor:
        self.batch = batch
        return super().sample(logits, batch, num_token_ids)


def test_each_row_gets_its_own_parameters() -> None:
    ops = _RecordingOps(torch.float32)
    chunks = [
        _chunk(temperature=0.0, seed=5, start=3),
        _chunk(temperature=0.7, top_k=4, top_p=0.9, min_p=0.1, seed=2**63 - 1, count=7),
    ]
    Sampler(ops, 40).sample(_logits(2), chunks)
    batch = ops.batch
    assert batch.temperatures.tolist() == torch.tensor([0.0, 0.7]).tolist()
    assert batch.top_ks.tolist() == [0, 4]
    assert batch.top_ps.tolist() == torch.tensor([1.0, 0.9]).tolist()
    assert batch.min_ps.tolist() == torch.tensor([0.0, 0.1]).tolist()
    assert batch.draws.tolist() == [draw_bits(5, 4), draw_bits(2**63 - 1, 7)]
    columns = (batch.temperatures, batch.top_ps, batch.min_ps, batch.top_ks, batch.draws)
    assert [c.dtype for c in columns] == [torch.float32] * 3 + [torch.int64] * 2


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    logits = _logits(12)
    chunks = [
        _chunk(seed=row % 3, start=row, temperature=0.3 * (row % 4), num_logprobs=3) for row in range(12)
    ]
    together = _sample(logits, chunks)
    alone = [_sample(logits[row : row + 1], chunks[row : row + 1])[0] for row in range(12)]
    assert together == alone
    assert _sample(logits.flip(0), chunks[::-1]) == together[::-1]


def test_a_position_draws_the_same_however_it_was_reached() -> None:
    """Decoded, or the end of a prefill after preemption."""
    logits = torch.zeros(1, 1000)
    [decoded] = _sample(logits, [_chunk(start=20, count=1)])
    [prefilled] = _sample(logits, [_chunk(start=4, count=17)])
    [other] = _sample(logits, [_chunk(start=21, count=1)])
    assert decoded == prefilled != other


def test_padding_ids_are_never_sampled_nor_listed() -> None:
    logits = _logits(50)
    logits[:, 30:] += 100
    chunks = [_chunk(seed=seed, temperature=seed % 2, num_logprobs=40) for seed in range(50)]
    for sampled in _sample(logits, chunks, num_token_ids=30):
        assert sampled.token_id < 30
        assert sampled.logprobs is not None
        assert sorted(token_id for token_id, _ in sampled.logprobs.top) == list(range(30))


def test_a_chunk_without_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="request r: its chunk has nothing to sample"):
        _sample(_logits(1), [Chunk("r", [1], 0, [0], None)])


# Log-probabilities.


def _logprobs(sampled: SampledToken) -> TokenLogprobs:
    assert sampled.logprobs is not None
    return sampled.logprobs


@pytest.mark.parametrize("count", [0, 1, 5, 40, 100])
def test_logprobs_are_of_the_unmodified_distribution(count: int) -> None:
    logits = _logits(4)
    chunks = [_chunk(seed=row, temperature=1.7, top_k=3, num_logprobs=count) for row in range(4)]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, sampled in enumerate(_sample(logits, chunks)):
        logprobs = _logprobs(sampled)
        assert logprobs.logprob == pytest.approx(expected[row, sampled.token_id].item(), abs=1e-5)
        ranked = expected[row].sort(descending=True)
        assert [token_id for token_id, _ in logprobs.top] == ranked.indices[:count].tolist()
        values = torch.tensor([value for _, value in logprobs.top])
        assert_close(values, ranked.values[:count], max_error=1e-5, rms_error=1e-5)


def test_logprobs_only_where_they_were_asked_for() -> None:
    logits = _logits(3)
    sampled = _sample(logits, [_chunk(num_logprobs=None), _chunk(num_logprobs=0), _chunk(num_logprobs=2)])
    assert sampled[0].logprobs is None
    assert [len(_logprobs(s).top) for s in sampled[1:]] == [0, 2]


def test_logprobs_are_unmodified_beside_rows_that_are_adjusted() -> None:
    """With adjustments and without, where all rows ask and where some do."""
    logits = _logits(4)
    expected = torch.log_softmax(logits.double(), dim=-1)
    rules = {"logit_bias": ((3, 50.0), (7, -100.0)), "frequency_penalty": 2.0, "repetition_penalty": 3.0}
    for asks in ([0, 1, 2, 3], [1, 3]):
        chunks = [
            _chunk(num_logprobs=40 if row in asks else None, prompt=(3, 5), output=(7, 7, 9), **rules)
            for row in range(4)
        ]
        for row, sampled in enumerate(_sample(logits, chunks)):
            assert sampled.token_id == 3
            assert (sampled.logprobs is not None) == (row in asks)
            if sampled.logprobs is not None:
                found = dict(sampled.logprobs.top)
                values = torch.tensor([found[token_id] for token_id in range(40)])
                assert_close(values, expected[row], max_error=1e-5, rms_error=1e-5)
                assert sampled.logprobs.logprob == found[3]


# The distribution, with every backend.

ALL_OPS: list[Ops[Any]] = [ReferenceOps(torch.float32), TritonOps(torch.float32, ARCHES[0])]
NUM_TOKENS = 12
PROMPT, OUTPUT = (1, 2, 2, 3), (3, 4, 4, 4, 5, 11)

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.15},
    {"temperature": 1.6, "top_k": 8, "top_p": 0.9, "min_p": 0.02},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.6},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5, "frequency_penalty": -0.5, "presence_penalty": -1.0},
    {"logit_bias": ((0, 2.0), (6, -3.0), (9, 1.0))},
    {"allowed_token_ids": (1, 4, 6, 11)},
    {"bad_words": ((0,), (11, 9), (5, 11, 2), (4, 11, 3))},
    {"min_tokens": 7, "stop_token_ids": (6, 9)},
    {
        "temperature": 1.3,
        "top_p": 0.95,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.3,
        "logit_bias": ((4, 3.0), (2, 1.0)),
        "bad_words": ((11, 7),),
        "min_tokens": 9,
        "stop_token_ids": (8,),
    },
]


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_tokens_are_distributed_as_defined(sampling: dict[str, Any]) -> None:
    """Each seed is another draw; rows of another request come after."""
    logits, count = _logits(1, NUM_TOKENS + 4)[0], 4000
    asking = [
        _chunk(seed=seed, prompt=PROMPT, output=OUTPUT, num_tokens=NUM_TOKENS, **sampling)
        for seed in range(count)
    ]
    others = [_chunk(seed=1, logit_bias=((2, 100.0),), num_tokens=NUM_TOKENS)] * 3
    sampled = _sample(logits.expand(count + 3, -1), [*asking, *others], NUM_TOKENS)
    params = asking[0].sampling
    assert params is not None
    adjusted = adjusted_logits(logits[:NUM_TOKENS].double().tolist(), params, PROMPT, OUTPUT)
    assert_distributed([s.token_id for s in sampled[:count]], token_distribution(adjusted, params))
    assert [s.token_id for s in sampled[count:]] == [2] * 3


def test_triton_draws_the_same_tokens_with_the_same_logprobs() -> None:
    """So they have the same distribution."""
    chunks = [
        _chunk(
            seed=seed, prompt=PROMPT, output=OUTPUT, num_tokens=NUM_TOKENS, num_logprobs=5 * seed, **sampling
        )
        for sampling in FILTERS
        for seed in range(2)
    ]
    logits = _logits(len(chunks), NUM_TOKENS + 4)
    found, expected = (_sample(logits, chunks, NUM_TOKENS, ops) for ops in ALL_OPS)
    assert [s.token_id for s in found] == [s.token_id for s in expected]
    for own, other in zip(map(_logprobs, found), map(_logprobs, expected), strict=True):
        assert own.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [token_id for token_id, _ in own.top] == [token_id for token_id, _ in other.top]


@pytest.mark.parametrize("ops", ALL_OPS, ids=lambda ops: type(ops).__name__)
def test_greedy_takes_the_largest_adjusted_logit(ops: Ops[Any]) -> None:
    logits = _logits(len(FILTERS), NUM_TOKENS)
    chunks = [
        _chunk(prompt=PROMPT, output=OUTPUT, num_tokens=NUM_TOKENS, **(f | {"temperature": 0.0}))
        for f in FILTERS
    ]
    for row, sampled in enumerate(_sample(logits, chunks, NUM_TOKENS, ops)):
        params = chunks[row].sampling
        assert params is not None
        adjusted = adjusted_logits(logits[row].double().tolist(), params, PROMPT, OUTPUT)
        assert sampled.token_id == adjusted.index(max(adjusted))


def test_neighbours_rules_change_nothing() -> None:
    logits = _logits(len(FILTERS) + 1)
    plain = _chunk(seed=5, num_logprobs=3)
    neighbours = [_chunk(seed=9, prompt=PROMPT, output=OUTPUT, num_logprobs=20, **f) for f in FILTERS]
    [alone] = _sample(logits[:1], [plain])
    assert _sample(logits, [plain, *neighbours])[0] == alone


# Cost.


class _CountingOps(ReferenceOps):
    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.calls: list[str] = []

    def adjust_logits(self, logits: Tensor, adjustments: LogitAdjustments) -> None:
        self.calls.append("adjust_logits")
        super().adjust_logits(logits, adjustments)

    def token_logprobs(self, logits: Tensor, token_ids: Tensor, num_token_ids: int, num_top: int) -> Logprobs:
        self.calls.append("token_logprobs")
        return super().token_logprobs(logits, token_ids, num_token_ids, num_top)


@pytest.mark.parametrize(
    ("sampling", "calls"),
    [
        ({"temperature": 0.5, "top_p": 0.9}, []),
        ({"presence_penalty": 0.1}, ["adjust_logits"]),
        ({"num_logprobs": 0}, ["token_logprobs"]),
    ],
)
def test_one_call_for_all_rows_and_none_for_what_nobody_asked_for(
    sampling: dict[str, Any], calls: list[str]
) -> None:
    ops = _CountingOps()
    Sampler(ops, 40).sample(_logits(9), [_chunk(**sampling) for _ in range(9)])
    assert ops.calls == calls


# Drafts.


def _drafted(chunk: Chunk, drafts: list[int]) -> Chunk:
    return replace(chunk, token_ids=[*chunk.token_ids, *drafts], num_drafts=len(drafts))


def _one_by_one(logits: Tensor, **sampling: Any) -> list[SampledToken]:
    """What a request draws without drafts: row n of the logits is that after n tokens of output."""
    output: list[int] = []
    sampled = []
    for position in range(len(logits)):
        chunk = _chunk(start=position, prompt=PROMPT, output=tuple(output), **sampling)
        sampled += _sample(logits[position : position + 1], [chunk])
        output.append(sampled[-1].token_id)
    return sampled


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_drafts_change_no_token(sampling: dict[str, Any], num_right: int) -> None:
    """The first num_right drafts are what comes; then one is not, and one is what would have come."""
    logits = _logits(6)
    asked = sampling | {"seed": 4, "num_logprobs": 2, "num_tokens": 40}
    expected = _one_by_one(logits[1:5], **asked)
    drafts = [token.token_id for token in expected[:3]]
    if num_right < 3:
        drafts[num_right] = (drafts[num_right] + 1) % 40
    drafted = _drafted(_chunk(prompt=PROMPT, **asked), drafts)
    beside = [_chunk(seed=1), _chunk(seed=2)]
    sampler = Sampler(ReferenceOps(torch.float32), 1000)
    first, middle, last = sampler.sample(logits.clone(), [beside[0], drafted, beside[1]]).tokens()
    assert list(middle) == expected[: num_right + 1]
    assert [len(first), len(last)] == [1, 1]


def test_the_first_draft_stays_with_its_probability() -> None:
    """And whether it stays or not, the token is distributed as without a draft."""
    logits, count = _logits(1, NUM_TOKENS)[0], 4000
    sampler = Sampler(ReferenceOps(torch.float32), NUM_TOKENS)
    chunks = [_drafted(_chunk(seed=seed, temperature=1.2), [4]) for seed in range(count)]
    sampled = sampler.sample(logits.repeat(2 * count, 1), chunks).tokens()
    params = chunks[0].sampling
    assert params is not None
    expected = token_distribution(logits.double().tolist(), params)
    assert_distributed([tokens[0].token_id for tokens in sampled], expected)
    assert all((len(tokens) == 2) == (tokens[0].token_id == 4) for tokens in sampled)
