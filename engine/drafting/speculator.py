"""Speculation between steps: learns from what was accepted, decides how far to guess, and has it guessed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nybble.engine.drafting.depth_policy import DepthPolicy
from nybble.engine.drafting.drafter import Drafter, Drafts
from nybble.engine.messages import SpeculationStats
from nybble.engine.scheduling.step import Chunk, SampledToken, StepPlan


class Speculator:
    """clock: seconds, from any origin."""

    def __init__(self, drafter: Drafter, max_num_drafts: int, clock: Callable[[], float]) -> None:
        self._drafter = drafter
        self._policy = DepthPolicy(max_num_drafts)
        self._clock = clock
        self._num_drafts = [0] * max_num_drafts
        self._num_accepted = [0] * max_num_drafts
        self._depth = 0
        self._last_end: float | None = None
        self._last_requests: frozenset[str] = frozenset()

    def draft(self, plan: StepPlan, sampled: Sequence[tuple[SampledToken, ...]]) -> Drafts:
        """After each step, before its result is taken: drafts for the sequences that it sampled from."""
        chunks = plan.sampling_chunks
        for chunk, tokens in zip(chunks, sampled, strict=True):
            self._count(chunk.num_drafts, len(tokens) - 1)
        self._depth = self._policy.choose(len(chunks)) if chunks else 0
        wanted = {chunk.request_id: self._depth for chunk in chunks} if self._depth else {}
        drafts = self._drafter.draft(plan, sampled, wanted)
        self._observe_time(plan, chunks)
        return drafts

    def stats(self) -> SpeculationStats:
        return SpeculationStats(
            num_drafts=tuple(self._num_drafts),
            num_accepted=tuple(self._num_accepted),
            depth=self._depth,
        )

    def _count(self, num_drafts: int, num_accepted: int) -> None:
        for position in range(num_drafts):
            self._num_drafts[position] += 1
            self._num_accepted[position] += position < num_accepted
        self._policy.observe_drafts(num_drafts, num_accepted)

    def _observe_time(self, plan: StepPlan, chunks: tuple[Chunk, ...]) -> None:
        """A step's time is that since the last one ended: known if the engine had work all the time, of use
        if it decodes only, and verifies as many drafts as it makes."""
        now, last, requests = self._clock(), self._last_end, frozenset(c.request_id for c in chunks)
        is_decode = plan.num_tokens == sum(1 + chunk.num_drafts for chunk in chunks)
        depth = max((chunk.num_drafts for chunk in chunks), default=0)
        follows = last is not None and requests and requests <= self._last_requests
        if last is not None and follows and is_decode and depth == self._depth:
            self._policy.observe_time(len(chunks), depth, now - last)
        self._last_end, self._last_requests = now, requests
