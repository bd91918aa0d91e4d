"""For how many tokens kernels are chosen and launched: a decision made once, for a whole backend.

Usually for those of the step. Few tokens and many then take other kernels, tiles and warps, which add up in
other orders, so that a token's last bits depend on what else is in its step.

A fixed number fixes all of that: one kernel for each operation, in one configuration. Its grid still grows
with the tokens at hand, and each token stands in a row or column of a tile that no other one touches. Two
operations choose by more than a number. Attention is that for chunks, whose program goes through the keys of
a sequence from the first on: what it does with a token is the same in a chunk and alone. And products that
torch computes are `InvariantArithmetic`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.kernels.arithmetic import PLAIN, Arithmetic
from nybble.kernels.invariant_arithmetic import InvariantArithmetic


@dataclass(frozen=True)
class LaunchPolicy:
    """fixed_tokens: None for the step's own number; arithmetic: of what has no kernel."""

    fixed_tokens: int | None = None
    arithmetic: Arithmetic = PLAIN

    @property
    def is_invariant(self) -> bool:
        return self.fixed_tokens is not None

    def tokens(self, num_tokens: int) -> int:
        """For how many tokens to launch where there are num_tokens."""
        return num_tokens if self.fixed_tokens is None else self.fixed_tokens


ADAPTIVE = LaunchPolicy()


def invariant_policy() -> LaunchPolicy:
    """16 tokens are what the smallest matrix instructions take: decoding one wastes the fewest of them. More
    than 8, so that experts come in tiles, and a prompt need not read an expert for every token."""
    return LaunchPolicy(fixed_tokens=16, arithmetic=InvariantArithmetic())
