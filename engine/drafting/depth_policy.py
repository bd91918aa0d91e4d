"""How many tokens to draft for each sequence: as many as give the most tokens a second.

Kept are running estimates of two things:

    acceptance    of the draft at each position, where all before it were accepted; the same for all batches
    step time     by batch size (in powers of two) and depth, the median of the last few

With d drafts a step is expected to give 1 + a_1 + a_1 a_2 + ... + a_1 .. a_d tokens a sequence. What that is
worth differs with the batch: a small one reads all weights anyway, and verifies drafts almost for nothing; a
large one pays for every token, and rejected drafts are a loss. So each batch size has its own best depth,
which may be 0.

Each depth is tried once for a few steps. After that, now and then, one that is not the best is tried again,
so that estimates don't grow old: at most `_TRIAL_STEPS` steps in `_TRIAL_INTERVAL`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

_TRIAL_STEPS = 6
_TRIAL_INTERVAL = 240
_NUM_TIMES = 9  # that a median is taken of
_DECAY = 0.995  # of an observation's weight with each later one at its position
_PRIOR_ACCEPTANCE, _PRIOR_WEIGHT = 0.7, 2.0


class DepthPolicy:
    """Depths are 0 .. max_depth."""

    def __init__(self, max_depth: int) -> None:
        self._max_depth = max_depth
        self._acceptance = [_Acceptance() for _ in range(max_depth)]
        self._batches: dict[int, _Batch] = {}

    def choose(self, batch_size: int) -> int:
        """How deep to draft for `batch_size` sequences. Called once a step."""
        return self._batch(batch_size).choose(self.expected_tokens)

    def observe_time(self, batch_size: int, depth: int, seconds: float) -> None:
        """A step took so long that verified and then made `depth` drafts for each of its sequences."""
        self._batch(batch_size).times[depth].append(seconds)

    def observe_drafts(self, num_drafts: int, num_accepted: int) -> None:
        """Of a sequence's drafts the first num_accepted were accepted."""
        for position, estimate in enumerate(self._acceptance[: min(num_drafts, num_accepted + 1)]):
            estimate.observe(position < num_accepted)

    def expected_tokens(self, depth: int) -> float:
        """Of a sequence in a step, with `depth` drafts."""
        total = probability = 1.0
        for estimate in self._acceptance[:depth]:
            probability *= estimate.value
            total += probability
        return total

    def _batch(self, batch_size: int) -> _Batch:
        size = batch_size.bit_length()
        if size not in self._batches:
            self._batches[size] = _Batch(self._max_depth)
        return self._batches[size]


class _Acceptance:
    """Of drafts at one position: a running average, the latest of which weigh most."""

    def __init__(self) -> None:
        self._weight = _PRIOR_WEIGHT
        self._accepted = _PRIOR_WEIGHT * _PRIOR_ACCEPTANCE

    @property
    def value(self) -> float:
        return self._accepted / self._weight

    def observe(self, is_accepted: bool) -> None:
        self._weight = self._weight * _DECAY + 1
        self._accepted = self._accepted * _DECAY + is_accepted


class _Batch:
    """Step times of batches of about one size, and which depth is tried."""

    def __init__(self, max_depth: int) -> None:
        self.times: list[deque[float]] = [deque(maxlen=_NUM_TIMES) for _ in range(max_depth + 1)]
        self._trials = deque(range(max_depth, -1, -1))  # depths to try, the first one now
        self._num_left = _TRIAL_STEPS  # of the steps that the first one is tried for
        self._num_steps = 0  # since the last trial
        self._next_trial = max_depth

    def choose(self, expected_tokens: Callable[[int], float]) -> int:
        if self._trials:
            return self._try()
        best = self._best(expected_tokens)
        self._num_steps += 1
        if self._num_steps >= _TRIAL_INTERVAL:
            self._num_steps = 0
            self._trials.append(self._other_than(best))
        return best

    def _try(self) -> int:
        depth = self._trials[0]
        self._num_left -= 1
        if self._num_left == 0:
            self._num_left = _TRIAL_STEPS
            self._trials.popleft()
        return depth

    def _best(self, expected_tokens: Callable[[int], float]) -> int:
        """Of the depths whose step time is known; the greatest if none is."""
        known = [depth for depth, times in enumerate(self.times) if times]
        if not known:
            return len(self.times) - 1
        return max(known, key=lambda depth: expected_tokens(depth) / median(self.times[depth]))

    def _other_than(self, best: int) -> int:
        """Takes turns among the depths."""
        self._next_trial = (self._next_trial + 1) % len(self.times)
        if self._next_trial == best:
            self._next_trial = (self._next_trial + 1) % len(self.times)
        return self._next_trial
