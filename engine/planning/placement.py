"""Which part of the model a rank holds.

The layers are divided among pipeline stages, in runs as equal as can be. Within a stage, tensor-parallel
ranks divide each parameter as its `Shard` says. Ranks are numbered stage by stage, so that those of a
stage, which speak to each other in every layer, are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.engine.checkpoint.checkpoint import Span
from nybble.engine.checkpoint.parameters import Parameter


@dataclass(frozen=True)
class Split:
    """Ranks = tensor_parallel x pipeline_parallel.

    With `expert_parallel` 1 each rank of a stage has its share of every routed expert; with as many as
    tensor_parallel it has its share of the experts, whole.
    """

    tensor_parallel: int = 1
    expert_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def __str__(self) -> str:
        return f"TP {self.tensor_parallel}, EP {self.expert_parallel}, PP {self.pipeline_parallel}"


@dataclass(frozen=True)
class Placement:
    """The place of one of a split's ranks."""

    split: Split = Split()
    rank: int = 0

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.split.tensor_parallel

    @property
    def stage(self) -> int:
        return self.rank // self.split.tensor_parallel

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.split.pipeline_parallel - 1

    def layers(self, num_layers: int) -> range:
        return stage_layers(num_layers, self.stage, self.split.pipeline_parallel)

    def units(self, num_units: int) -> range:
        """The rank's share of what tensor-parallel ranks divide."""
        return share(num_units, self.tensor_rank, self.split.tensor_parallel)

    def experts(self, num_experts: int) -> range:
        """The routed experts that the rank holds, or holds a share of."""
        if self.split.expert_parallel == 1:
            return range(num_experts)
        return share(num_experts, self.tensor_rank, self.split.expert_parallel)

    def span(self, parameter: Parameter) -> Span | None:
        """What the rank holds of a parameter that stands on its stage; None if all of it."""
        shard, ranks = parameter.shard, self.split.tensor_parallel
        if shard is None or ranks == 1 or (parameter.is_expert and self.split.expert_parallel > 1):
            return None
        unit = parameter.shape[shard.axis] // shard.num_units
        units = self.units(shard.num_units)
        return Span(shard.axis, units.start * unit, units.stop * unit)


def share(num_units: int, rank: int, num_ranks: int) -> range:
    """The units of `rank`: as even as can be; with fewer units than ranks, one that others have too."""
    start = num_units * rank // num_ranks
    return range(start, max(start + 1, num_units * (rank + 1) // num_ranks))


def stage_layers(num_layers: int, stage: int, num_stages: int) -> range:
    """The layers of a pipeline stage; those left over go to the first stages, as the last has the head."""
    return range(-(-num_layers * stage // num_stages), -(-num_layers * (stage + 1) // num_stages))
