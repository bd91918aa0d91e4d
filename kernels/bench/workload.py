"""A benchmark case that is ready to run: our kernels, what they should give, and others that do the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nybble.kernels.bench.correctness import Deviation, Tolerance
from nybble.kernels.bench.timing import Run


class PeerMissingError(Exception):
    """Another library cannot take part in a case; the message says why."""


@dataclass(frozen=True)
class Peer:
    """prepare: brings the case's inputs into the library's own form, which is not timed, and returns what is;
    that returns a tensor as `Workload.output` does. Raises PeerMissingError. tolerance: where it computes
    with fewer bits than our kernels."""

    name: str
    prepare: Callable[[], Callable[[], Tensor]]
    tolerance: Tolerance | None = None


@dataclass(frozen=True)
class Workload:
    """run: starts our kernels. output: what they computed, of what `run` returned. judge: how far that is
    from what the reference computes, which must be within `tolerance`."""

    run: Run
    output: Callable[[Any], Tensor]
    judge: Callable[[Tensor], Deviation]
    tolerance: Tolerance
    peers: tuple[Peer, ...] = ()


def as_tensor(output: Any) -> Tensor:
    """For a run that returns what it computed."""
    assert isinstance(output, Tensor)
    return output
