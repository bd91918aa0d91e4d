"""Drafters that know what will come, or nothing, and what they drafted."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

from nybble.engine.drafting.drafter import Drafter, Drafts
from nybble.engine.messages import Request
from nybble.engine.scheduling.step import SampledToken, StepPlan

Kind = Literal["right", "wrong", "mixed", "too few"]


def next_position(plan: StepPlan, sampled: Sequence[tuple[SampledToken, ...]]) -> dict[str, int]:
    """Position of the token that each request drafts for first."""
    chunks = zip(plan.sampling_chunks, sampled, strict=True)
    return {c.request_id: c.start + len(c.token_ids) - c.num_drafts + len(own) for c, own in chunks}


class ScriptedDrafter:
    """answers: the tokens of each request without drafts, so that drafts are right or wrong as wanted."""

    def __init__(self, kind: Kind, requests: Sequence[Request], answers: Mapping[str, Sequence[int]]) -> None:
        self._kind = kind
        self._texts = {r.request_id: [*r.prompt_token_ids, *answers[r.request_id]] for r in requests}
        self._random = random.Random(0)

    def draft(
        self, plan: StepPlan, sampled: Sequence[tuple[SampledToken, ...]], num_drafts: Mapping[str, int]
    ) -> Drafts:
        positions = next_position(plan, sampled)
        return {name: self._draft(name, positions[name], count) for name, count in num_drafts.items()}

    def _draft(self, request_id: str, position: int, count: int) -> tuple[int, ...]:
        # Beyond the answer, which then ends before those drafts count, something.
        comes = [*self._texts[request_id][position : position + count], *[1] * count][:count]
        if self._kind == "too few":
            return tuple(comes[: self._random.randrange(count + 1)])
        return tuple(token_id if self._is_right() else (token_id + 1) % 160 for token_id in comes)

    def _is_right(self) -> bool:
        return self._kind == "right" or (self._kind == "mixed" and self._random.random() < 0.6)


class WatchedDrafter:
    """Keeps what another drafter drafts: (request, position of the first draft, drafts)."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.drafted: list[tuple[str, int, tuple[int, ...]]] = []

    def draft(
        self, plan: StepPlan, sampled: Sequence[tuple[SampledToken, ...]], num_drafts: Mapping[str, int]
    ) -> Drafts:
        drafts = self._drafter.draft(plan, sampled, num_drafts)
        positions = next_position(plan, sampled)
        self.drafted += [(name, positions[name], tokens) for name, tokens in drafts.items()]
        return drafts
