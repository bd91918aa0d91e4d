"""Decode steps as CUDA graphs: one launch by the host instead of a thousand.

A graph repeats recorded kernels on recorded addresses. So there is one for each of a few batch sizes,
recorded at start with inputs of its own; a step is copied there, padded with sequences that have no context,
whose tokens are written nowhere. Operations decide nothing by what is in device memory, so a recording holds
for every step of its size.

Recording needs a GPU; everything else here does not know of CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.engine.step import StepInput
from nybble.kernels.ops import AttentionBatch

Run = Callable[[], Tensor]
# Records what a function launches: the returned one repeats it and gives its result, at the same address.
Record = Callable[[Run], Run]


@dataclass(frozen=True)
class _Recording:
    inputs: StepInput
    replay: Run


class DecodeGraphs:
    """Recordings of `forward`, which maps steps to logits, for batches of 1, 2, 4 ... max_num_seqs sequences.

    max_blocks: of the longest block table.
    """

    def __init__(
        self,
        forward: Callable[[StepInput], Tensor],
        record: Record,
        max_num_seqs: int,
        max_blocks: int,
        device: torch.device,
    ) -> None:
        self._recordings: dict[int, _Recording] = {}
        # The largest first: smaller ones then find room in the memory that it has taken.
        for size in sorted(_sizes(max_num_seqs), reverse=True):
            inputs = _padding(size, max_blocks, device)
            self._recordings[size] = _Recording(inputs, record(_run(forward, inputs)))

    def can_run(self, step: StepInput) -> bool:
        """Whether each sequence has one token, which is sampled from."""
        num_tokens = len(step.token_ids)
        is_decode = num_tokens == len(step.attention.query_lengths) == len(step.logit_rows)
        return is_decode and num_tokens <= max(self._recordings)

    def run(self, step: StepInput) -> Tensor:
        """Logits [S, V] of a step that `can_run`, valid until the next."""
        num_tokens = len(step.token_ids)
        recording = self._recordings[_size_for(num_tokens)]
        _fill(recording.inputs, step)
        return recording.replay()[:num_tokens]


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

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _run(forward: Callable[[StepInput], Tensor], inputs: StepInput) -> Run:
    return lambda: forward(inputs)


def _sizes(largest: int) -> list[int]:
    return [1 << n for n in range((largest - 1).bit_length() + 1)]


def _size_for(num_tokens: int) -> int:
    return 1 << (num_tokens - 1).bit_length()


def _padding(size: int, max_blocks: int, device: torch.device) -> StepInput:
    """A step of `size` sequences without context, whose tokens go to no slot."""

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return StepInput(
        token_ids=zeros(size, dtype=torch.int64),
        positions=zeros(size, dtype=torch.int64),
        attention=AttentionBatch(
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lengths=zeros(size, dtype=torch.int32),
            block_tables=zeros(size, max_blocks, dtype=torch.int32),
            slots=zeros(size, dtype=torch.int64).fill_(-1),
            query_lengths=(1,) * size,
        ),
        logit_rows=torch.arange(size, device=device),
    )


def _fill(inputs: StepInput, step: StepInput) -> None:
    """Copy a step, one token a sequence, over the first rows of `inputs`; the rest become padding.

    Block tables keep what lies beyond a context: nobody reads it.
    """
    num_tokens, (_, width) = len(step.token_ids), step.attention.block_tables.shape
    inputs.token_ids[:num_tokens].copy_(step.token_ids)
    inputs.positions[:num_tokens].copy_(step.positions)
    inputs.attention.slots.fill_(-1)
    inputs.attention.slots[:num_tokens].copy_(step.attention.slots)
    inputs.attention.context_lengths.zero_()
    inputs.attention.context_lengths[:num_tokens].copy_(step.attention.context_lengths)
    inputs.attention.block_tables[:num_tokens, :width].copy_(step.attention.block_tables)
