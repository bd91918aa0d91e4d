"""The policy against devices whose costs are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from nybble.engine.drafting.depth_policy import DepthPolicy

MAX_DEPTH = 4
Cost = Callable[[int, int], float]  # of a batch size and a depth: seconds


class Device:
    """Runs steps of a policy; keeps depths and counts tokens and seconds."""

    def __init__(self, cost: Cost, acceptance: Sequence[float], noise: float = 0.0) -> None:
        self.policy = DepthPolicy(MAX_DEPTH)
        self.cost, self.acceptance = cost, acceptance
        self.depths: list[int] = []
        self.tokens = self.seconds = 0.0
        self._random, self._noise = random.Random(1), noise
        self._depth = 0

    def run(self, batch_size: int, num_steps: int) -> list[int]:
        """The depths of these steps."""
        for _ in range(num_steps):
            self._step(batch_size)
        return self.depths[-num_steps:]

    def _step(self, batch_size: int) -> None:
        verified, self._depth = self._depth, self.policy.choose(batch_size)
        self.depths.append(self._depth)
        for _ in range(batch_size):
            accepted = 0
            while accepted < verified and self._random.random() < self.acceptance[accepted]:
                accepted += 1
            self.policy.observe_drafts(verified, accepted)
            self.tokens += 1 + accepted
        seconds = self.cost(batch_size, verified) * (1 + self._noise * self._random.random())
        self.seconds += seconds
        if verified == self._depth:
            self.policy.observe_time(batch_size, verified, seconds)


def best_depth(cost: Cost, acceptance: Sequence[float], batch_size: int) -> int:
    def speed(depth: int) -> float:
        tokens, probability = 1.0, 1.0
        for position in range(depth):
            probability *= acceptance[position]
            tokens += probability
        return tokens / cost(batch_size, depth)

    return max(range(MAX_DEPTH + 1), key=speed)


def memory_bound(batch_size: int, depth: int) -> float:
    """Weights are read once; each token and each draft costs a little."""
    return 1.0 + 0.02 * batch_size * (1 + depth) + 0.05 * depth


CASES = [
    ([0.9, 0.85, 0.8, 0.7], 1),
    ([0.9, 0.6, 0.4, 0.2], 4),
    ([0.9, 0.6, 0.4, 0.2], 60),
    ([0.05, 0.02, 0.01, 0.01], 1),
    ([0.5, 0.4, 0.3, 0.2], 64),
]


@pytest.mark.parametrize(("acceptance", "batch_size"), CASES)
def test_settles_on_the_best_depth(acceptance: Sequence[float], batch_size: int) -> None:
    device = Device(memory_bound, acceptance, noise=0.02)
    device.run(batch_size, 600)
    late = device.run(batch_size, 1000)
    best = best_depth(memory_bound, acceptance, batch_size)
    assert late.count(best) > 900, (best, {depth: late.count(depth) for depth in set(late)})


def test_cases_have_different_answers() -> None:
    assert {best_depth(memory_bound, *case) for case in CASES} >= {0, 1, 4}


def test_is_off_where_it_is_a_loss_and_on_where_it_is_not() -> None:
    """By batch size, in one engine."""
    acceptance = [0.8, 0.5, 0.3, 0.1]
    device = Device(lambda batch, depth: max(1.0, batch * (1 + depth) / 8) + 0.02 * depth, acceptance)
    for _ in range(4):
        device.run(1, 200)
        device.run(32, 200)
    small, large = device.run(1, 100), device.run(32, 100)
    assert small.count(0) < 10 and large.count(0) > 90


@pytest.mark.parametrize("acceptance", [[0.0] * 4, [0.3, 0.2, 0.1, 0.1]])
def test_trials_cost_little_where_drafts_are_a_loss(acceptance: Sequence[float]) -> None:
    def cost(batch_size: int, depth: int) -> float:
        return 1 + 0.5 * depth

    device = Device(cost, acceptance)
    device.run(8, 5000)
    assert device.tokens / device.seconds >= 0.94 * 8  # tokens a second without drafts


def test_notices_when_drafts_get_good_and_bad() -> None:
    device = Device(memory_bound, [0.0] * 4)
    assert device.run(1, 800)[-200:].count(0) > 180
    device.acceptance = [0.95] * 4
    assert device.run(1, 3000)[-200:].count(4) > 180
    device.acceptance = [0.0] * 4
    assert device.run(1, 3000)[-200:].count(0) > 180


def test_notices_when_steps_change() -> None:
    device = Device(memory_bound, [0.9] * 4)
    assert device.run(2, 800)[-100:].count(4) > 90
    device.cost = lambda batch_size, depth: 1.0 + depth
    assert device.run(2, 800)[-100:].count(0) > 90


def test_one_slow_step_changes_nothing() -> None:
    device = Device(memory_bound, [0.9] * 4)
    device.run(1, 200)
    device.policy.observe_time(1, 4, 100.0)
    assert device.run(1, 20).count(4) == 20


def test_without_any_time_it_drafts_as_deep_as_it_may() -> None:
    policy = DepthPolicy(2)
    assert [policy.choose(3) for _ in range(30)][-1] == 2


def test_expected_tokens_follow_acceptance() -> None:
    policy = DepthPolicy(2)
    for _ in range(2000):
        policy.observe_drafts(2, 1)
    assert policy.expected_tokens(0) == 1
    assert policy.expected_tokens(1) == pytest.approx(2, abs=0.01)
    assert policy.expected_tokens(2) == pytest.approx(2, abs=0.02)
