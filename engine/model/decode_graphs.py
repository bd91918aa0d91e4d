"""Decode steps as CUDA graphs: one launch by the host instead of a thousand.

A graph repeats recorded kernels on recorded addresses. So there is one for each of a few batch sizes, and for
each number of drafts that all sequences may have, recorded at start with inputs of its own; a step is copied
there, padded with sequences that have no context, whose tokens are written nowhere. Operations decide nothing
by what is in device memory, so a recording holds for every step of its size.

Recording needs a GPU; everything else here does not know of CUDA.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.engine.scheduling.step import StepInput
from nybble.kernels.ops import AttentionBatch

Outputs = tuple[Tensor, Tensor]
Run = Callable[[], Outputs]
# Records what a function launches: the returned one repeats it and gives its results, at the same addresses.
Record = Callable[[Run], Run]


@dataclass(frozen=True)
class _Recording:
    inputs: StepInput
    replay: Run


class DecodeGraphs:
    """Recordings of `forward` for batches of 1, 2, 4 ... max_num_seqs sequences.

    forward: maps a step to its logits and its hidden states, both with a row for each token. query_lengths:
    of the tokens that all sequences of a batch may have. max_blocks: of the longest block table.
    """

    def __init__(
        self,
        forward: Callable[[StepInput], Outputs],
        record: Record,
        max_num_seqs: int,
        query_lengths: Iterable[int],
        max_blocks: int,
        device: torch.device,
    ) -> None:
        self._recordings: dict[tuple[int, int], _Recording] = {}  # by sequences, and tokens of each
        # The largest first: smaller ones then find room in the memory that it has taken.
        shapes = itertools.product(_sizes(max_num_seqs), query_lengths)
        for size, length in sorted(shapes, key=math.prod, reverse=True):
            inputs = _padding(size, length, max_blocks, device)
            self._recordings[size, length] = _Recording(inputs, record(_run(forward, inputs)))

    def can_run(self, step: StepInput) -> bool:
        """Whether each sequence has the same few tokens, which are all sampled from."""
        lengths = set(step.attention.query_lengths)
        is_decode = len(step.token_ids) == len(step.logit_rows)
        return is_decode and len(lengths) == 1 and _shape(step) in self._recordings

    def run(self, step: StepInput) -> Outputs:
        """Logits [T, V] and hidden states [T, H] of a step that `can_run`, valid until the next."""
        recording = self._recordings[_shape(step)]
        _fill(recording.inputs, step)
        logits, hidden = recording.replay()
        num_tokens = len(step.token_ids)
        return logits[:num_tokens], hidden[:num_tokens]


def record_cuda_graph(run: Run) -> Run:
    """`Record` on the current GPU. Runs once before, so that kernels are compiled and libraries ready."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Outputs:
        graph.replay()
        return result

    return replay


def _run(forward: Callable[[StepInput], Outputs], inputs: StepInput) -> Run:
    return lambda: forward(inputs)


def _sizes(largest: int) -> list[int]:
    return [1 << n for n in range((largest - 1).bit_length() + 1)]


def _shape(step: StepInput) -> tuple[int, int]:
    """The recording that a step with sequences of one length needs."""
    lengths = step.attention.query_lengths
    return 1 << (len(lengths) - 1).bit_length(), lengths[0]


def _padding(size: int, length: int, max_blocks: int, device: torch.device) -> StepInput:
    """A step of `size` sequences of `length` tokens without context, whose tokens go to no slot."""
    num_tokens = size * length

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return StepInput(
        token_ids=zeros(num_tokens, dtype=torch.int64),
        positions=zeros(num_tokens, dtype=torch.int64),
        attention=AttentionBatch(
            query_starts=torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=device),
            context_lengths=zeros(size, dtype=torch.int32),
            block_tables=zeros(size, max_blocks, dtype=torch.int32),
            slots=zeros(num_tokens, dtype=torch.int64).fill_(-1),
            query_lengths=(length,) * size,
        ),
        logit_rows=torch.arange(num_tokens, device=device),
    )


def _fill(inputs: StepInput, step: StepInput) -> None:
    """Copy a step, whose sequences are as long as those of `inputs`, over its first rows; the rest become
    padding.

    Block tables keep what lies beyond a context: nobody reads it.
    """
    num_tokens, (num_sequences, width) = len(step.token_ids), step.attention.block_tables.shape
    inputs.token_ids[:num_tokens].copy_(step.token_ids)
    inputs.positions[:num_tokens].copy_(step.positions)
    inputs.attention.slots.fill_(-1)
    inputs.attention.slots[:num_tokens].copy_(step.attention.slots)
    inputs.attention.context_lengths.zero_()
    inputs.attention.context_lengths[:num_sequences].copy_(step.attention.context_lengths)
    inputs.attention.block_tables[:num_sequences, :width].copy_(step.attention.block_tables)
