from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from nybble.engine.messages import SamplingParams, TokenLogprobs
from nybble.engine.sampler import Sampler
from nybble.engine.step import Chunk, SampledToken
from nybble.kernels.ops import SamplingBatch
from nybble.kernels.random_bits import draw_bits
from nybble.kernels.reference_ops import ReferenceOps


def _chunk(start: int = 0, count: int = 1, **sampling: object) -> Chunk:
    params = SamplingParams(**({"max_tokens": 1, "seed": 0} | sampling))
    return Chunk("r", [1] * count, start, [0], params)


def _logits(rows: int, columns: int = 40) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 2


def _sample(logits: Tensor, chunks: list[Chunk], num_token_ids: int = 1000) -> list[SampledToken]:
    return Sampler(ReferenceOps(torch.float32), num_token_ids).sample(logits, chunks)


class _RecordingOps(ReferenceOps):
    """Keeps the batch that it was asked to sample."""

    batch: SamplingBatch

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        self.batch = batch
        return super().sample(logits, batch)


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
