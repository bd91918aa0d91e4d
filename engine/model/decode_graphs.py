"""Recorded decode steps: one launch by the host instead of a thousand.

A recording repeats operations on recorded addresses: as a CUDA graph, or on the CPU backend as a list of
calls. So there is one for each of a few batch sizes, and for each number of drafts that all sequences may
have, with inputs of its own; a step is copied there, padded with sequences that have no context, whose tokens
are written nowhere. What operations are done, and on what addresses, does not depend on what the inputs hold,
so a recording holds for every step of its size.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.engine.scheduling.step import StepInput
from nybble.kernels.ops import AttentionBatch

_Shape = tuple[int, int]  # sequences, and tokens of each
Outputs = tuple[Tensor, Tensor]
Run = Callable[[], Outputs]
# Records what a function launches: the returned one repeats it and gives its results, at the same addresses.
Record = Callable[[Run], Run]


@dataclass(frozen=True)
class Recorder:
    """A backend's way of recording.

    sizes: batches, in sequences, that have a recording; others take that of the next larger one. at_start:
    all are made then, else each by the first step that needs it: with sizes that have no gap, so that nothing
    is ever padded.
    """

    record: Record
    sizes: Sequence[int]
    at_start: bool


@dataclass(frozen=True)
class _Recording:
    inputs: StepInput
    replay: Run


class DecodeGraphs:
    """Recordings of `forward`.

    forward: maps a step to its logits and its hidden states, both with a row for each token. query_lengths:
    of the tokens that all sequences of a batch may have. max_blocks: of the longest block table.
    """

    def __init__(
        self,
        forward: Callable[[StepInput], Outputs],
        recorder: Recorder,
        query_lengths: Iterable[int],
        max_blocks: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._recorder = recorder
        self._max_blocks = max_blocks
        self._device = device
        self._sizes = sorted(recorder.sizes)
        self._query_lengths = frozenset(query_lengths)
        self._recordings: dict[_Shape, _Recording] = {}
        if recorder.at_start:
            self._record_all()

    def can_run(self, step: StepInput) -> bool:
        """Whether each sequence has the same few tokens, which are all sampled from."""
        lengths = step.attention.query_lengths
        is_decode = len(step.token_ids) == len(step.logit_rows) and len(set(lengths)) == 1
        return is_decode and lengths[0] in self._query_lengths and len(lengths) <= self._sizes[-1]

    def run(self, step: StepInput) -> Outputs:
        """Logits [T, V] and hidden states [T, H] of a step that `can_run`, valid until the next."""
        recording = self._recording(step)
        _fill(recording.inputs, step)
        logits, hidden = recording.replay()
        num_tokens = len(step.token_ids)
        return logits[:num_tokens], hidden[:num_tokens]

    def _record_all(self) -> None:
        # The largest first: smaller ones then find room in the memory that it has taken.
        shapes = itertools.product(self._sizes, self._query_lengths)
        for size, length in sorted(shapes, key=math.prod, reverse=True):
            self._record((size, length), _padding(size, length, self._max_blocks, self._device))

    def _recording(self, step: StepInput) -> _Recording:
        """The one that a step with sequences of one length needs."""
        lengths = step.attention.query_lengths
        shape = self._sizes[bisect_left(self._sizes, len(lengths))], lengths[0]
        if shape not in self._recordings:
            inputs = _padding(*shape, self._max_blocks, self._device)
            _fill(inputs, step)
            self._record(shape, inputs)
        return self._recordings[shape]

    def _record(self, shape: _Shape, inputs: StepInput) -> None:
        self._recordings[shape] = _Recording(inputs, self._recorder.record(lambda: self._forward(inputs)))


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4 ... up to the first that is not below `largest`."""
    return [1 << n for n in range((largest - 1).bit_length() + 1)]


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
    inputs.attention.slots[:num_tokens].copy_(step.attention.slots)
    inputs.attention.slots[num_tokens:].fill_(-1)
    inputs.attention.context_lengths[:num_sequences].copy_(step.attention.context_lengths)
    inputs.attention.context_lengths[num_sequences:].zero_()
    inputs.attention.block_tables[:num_sequences, :width].copy_(step.attention.block_tables)
