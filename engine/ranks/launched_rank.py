"""Which of the launched processes this one is, from the variables that torch's launcher sets.

https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables".
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from nybble.engine.errors import OptionError
from nybble.engine.planning.placement import Placement, Split


@dataclass(frozen=True)
class LaunchedRank:
    """`rank` of `num_ranks`; `local_rank` of `num_local_ranks` on this machine."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    num_local_ranks: int = 1

    @classmethod
    def from_environment(cls) -> LaunchedRank:
        """Raises OptionError if a variable is not a number, or they contradict each other."""
        if not is_launched():
            return cls()
        launched = cls(
            rank=_number("RANK", 0),
            num_ranks=_number("WORLD_SIZE", 1),
            local_rank=_number("LOCAL_RANK", 0),
            num_local_ranks=_number("LOCAL_WORLD_SIZE", 1),
        )
        if launched.rank >= launched.num_ranks or launched.local_rank >= launched.num_local_ranks:
            raise OptionError(
                f"the environment variables of torch's launcher contradict each other: {launched}"
            )
        return launched

    def place(self, split: Split) -> Placement:
        """Its place in `split`. Raises OptionError as `check_num_ranks`."""
        self.check_num_ranks(split.num_ranks)
        return Placement(split, self.rank)

    def check_num_ranks(self, num_ranks: int) -> None:
        """Raises OptionError unless as many ranks were started as the options call for."""
        if self.num_ranks != num_ranks:
            raise OptionError(
                f"tensor_parallel_size x pipeline_parallel_size calls for {num_ranks} ranks, "
                f"but {self.num_ranks} were started"
            )


def is_launched() -> bool:
    """Whether torch's launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise OptionError(f"environment variable {name} is {value!r}, expected a number")
    return int(value)
