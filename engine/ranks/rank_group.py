"""The ranks that run one model, and all that they say to each other, over torch.distributed.

    group      backend                  carries
    stage      NCCL, gloo on CPUs       partial sums and drafts, among the ranks of a pipeline stage
    default    NCCL, gloo on CPUs       hidden states to the next stage, logits to rank 0
    control    gloo                     the steps that rank 0 decides; reports while loading
    lifeline   gloo                     nothing until the end (`lifeline.py`)

A model on one rank uses none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from nybble.engine.planning.placement import Placement
from nybble.engine.ranks.lifeline import Lifeline

# Between two requests, and while one rank loads, the others wait: that is no error.
_PATIENCE = timedelta(days=365)


_END = 0


class Announced(IntEnum):
    """What rank 0 lets the others do."""

    STEP = 1
    DRAFT = 2


class RankGroup:
    """One rank's end of the group."""

    def __init__(self, placement: Placement) -> None:
        """Join the other ranks; waits until all are there."""
        self.placement = placement
        self._lifeline: Lifeline | None = None
        if placement.split.num_ranks > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)
            self._lifeline = Lifeline(dist.new_group(backend="gloo", timeout=_PATIENCE))
            self._stage = self._join_stage()

    @property
    def is_alone(self) -> bool:
        return self.placement.split.num_ranks == 1

    def close(self) -> None:
        """Leave, once all others do."""
        if self._lifeline is not None:
            self._lifeline.close()
            dist.destroy_process_group()

    # While a step runs: tensors on the model's device.

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum of each rank's `partial` over the ranks of the stage; overwrites it."""
        if self.placement.split.tensor_parallel > 1:
            dist.all_reduce(partial, group=self._stage)
        return partial

    def all_reduce_in_order(self, partial: Tensor) -> Tensor:
        """As `all_reduce`, but every number is added up in the order of ranks. Libraries cut a tensor into
        pieces and begin each at another rank, so that the order depends on a number's place."""
        if self.placement.split.tensor_parallel > 1:
            first, *others = self.gather_stage(partial)
            total = first.float()
            for part in others:
                total += part
            partial.copy_(total)
        return partial

    def gather_stage(self, share: Tensor) -> tuple[Tensor, ...]:
        """The `share`, of one shape, of each rank of the stage, in the order of ranks."""
        num_ranks = self.placement.split.tensor_parallel
        if num_ranks == 1:
            return (share,)
        shares = [torch.empty_like(share) for _ in range(num_ranks)]
        dist.all_gather(shares, share, group=self._stage)
        return tuple(shares)

    def send_hidden(self, hidden: Tensor) -> None:
        """Pass hidden states [T, H] on to the next stage."""
        dist.send(hidden, dst=self.placement.rank + self.placement.split.tensor_parallel)

    def receive_hidden(self, hidden: Tensor) -> None:
        """Overwrite `hidden` [T, H] with what the stage before sends."""
        dist.recv(hidden, src=self.placement.rank - self.placement.split.tensor_parallel)

    def send_logits(self, logits: Tensor) -> None:
        """Pass this rank's logits [S, V] on to rank 0."""
        dist.send(logits, dst=0)

    def receive_logits(self, parts: Iterable[Tensor]) -> None:
        """On rank 0: those of the other ranks of the last stage, in order; overwrites `parts`."""
        split = self.placement.split
        first = max(1, split.num_ranks - split.tensor_parallel)
        for rank, part in zip(range(first, split.num_ranks), parts, strict=True):
            dist.recv(part, src=rank)

    # Control: tensors on the host.

    def announce(self, work: Announced, numbers: Tensor) -> None:
        """From rank 0, tell all others what comes and send them int64 [N]."""
        if not self.is_alone:
            dist.broadcast(torch.tensor([work, len(numbers)]), src=0, group=self._control)
            dist.broadcast(numbers, src=0, group=self._control)

    def announce_end(self) -> None:
        """From rank 0, tell all others that nothing more comes."""
        if not self.is_alone:
            dist.broadcast(torch.tensor([_END, 0]), src=0, group=self._control)

    def next_announcement(self) -> tuple[Announced, Tensor] | None:
        """On the other ranks: what rank 0 announces, with int64 [N]; None at the end."""
        header = torch.zeros(2, dtype=torch.int64)
        dist.broadcast(header, src=0, group=self._control)
        work, size = header.tolist()
        if work == _END:
            return None
        numbers = torch.empty(size, dtype=torch.int64)
        dist.broadcast(numbers, src=0, group=self._control)
        return Announced(work), numbers

    def exchange(self, report: bytes) -> list[bytes]:
        """Every rank's report, in the order of ranks; all must take part."""
        if self.is_alone:
            return [report]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.placement.split.num_ranks)]
        dist.all_gather(sizes, torch.tensor([len(report)]), group=self._control)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(report)] = torch.tensor(list(report), dtype=torch.uint8)
        reports = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(reports, padded, group=self._control)
        return [bytes(r[:size].tolist()) for r, size in zip(reports, sizes, strict=True)]

    def _join_stage(self) -> dist.ProcessGroup:
        """The group of this rank's stage; every rank takes part in making every stage's."""
        split = self.placement.split
        firsts = range(0, split.num_ranks, split.tensor_parallel)
        groups: list[dist.ProcessGroup] = []
        for first in firsts:
            groups.append(dist.new_group(list(range(first, first + split.tensor_parallel))))
        return groups[self.placement.stage]
