"""A `Runner` without a model, whose memory behaves like a paged KV cache.

What a slot holds depends on every token before it, as keys and values do, and a token's successor on
everything the sequence's slots hold. So a wrong block table, a block shared with another context, or
one that was never written changes the tokens that come out, or is noticed at once.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence

from nybble.engine.scheduling.step import Chunk, SampledToken, StepPlan

VOCABULARY = 8


class PagedRunner:
    """Keeps every plan it ran in `plans`. If `fault` gives an error for a plan, it is raised after the plan's
    tokens were written."""

    def __init__(self, block_size: int) -> None:
        self.plans: list[StepPlan] = []
        self.fault: Callable[[StepPlan], Exception | None] = lambda plan: None
        self.num_faults = 0
        self.has_survived = True  # its faults
        self._block_size = block_size
        self._memory: dict[int, tuple[int, bytes]] = {}  # slot -> position, state

    def prepare(self, plan: StepPlan) -> None:
        """There is nothing to prepare."""

    def launch(self, plan: StepPlan) -> Callable[[], list[tuple[SampledToken, ...]]]:
        sampled = self.run(plan)
        return lambda: sampled

    def run(self, plan: StepPlan) -> list[tuple[SampledToken, ...]]:
        self.plans.append(plan)
        slots = [self._slot(chunk, position) for chunk in plan.chunks for position in _span(chunk)]
        if len(set(slots)) != len(slots):
            raise AssertionError("two tokens of a step are written to one slot")
        for chunk in plan.chunks:
            self._write(chunk)
        if (error := self.fault(plan)) is not None:
            self.num_faults += 1
            raise error
        return [tuple(self._sample(chunk)) for chunk in plan.sampling_chunks]

    def is_sound(self) -> bool:
        return self.has_survived

    def _sample(self, chunk: Chunk) -> Iterator[SampledToken]:
        """Tokens as long as the drafts are what comes, and the next one."""
        end = chunk.start + len(chunk.token_ids)
        for position in range(end - chunk.num_drafts, end + 1):
            token_id = _successor(self._read(chunk, position))
            yield SampledToken(token_id, None)
            if position < end and chunk.token_ids[position - chunk.start] != token_id:
                return

    def _write(self, chunk: Chunk) -> None:
        state = self._read(chunk, chunk.start)[-1] if chunk.start else b""
        for position, token_id in zip(_span(chunk), chunk.token_ids, strict=True):
            state = _extend(state, token_id)
            self._memory[self._slot(chunk, position)] = (position, state)

    def _read(self, chunk: Chunk, length: int) -> list[bytes]:
        states = []
        for position in range(length):
            written, state = self._memory[self._slot(chunk, position)]
            if written != position:
                raise AssertionError(f"{chunk.request_id}: position {position} holds position {written}")
            states.append(state)
        return states

    def _slot(self, chunk: Chunk, position: int) -> int:
        return chunk.blocks[position // self._block_size] * self._block_size + position % self._block_size


def next_token(token_ids: Sequence[int]) -> int:
    """What the runner answers after `token_ids`, without any memory."""
    states, state = [], b""
    for token_id in token_ids:
        state = _extend(state, token_id)
        states.append(state)
    return _successor(states)


def _span(chunk: Chunk) -> range:
    return range(chunk.start, chunk.start + len(chunk.token_ids))


def _extend(state: bytes, token_id: int) -> bytes:
    return hashlib.blake2b(state + array("q", [token_id]).tobytes(), digest_size=8).digest()


def _successor(states: list[bytes]) -> int:
    return hashlib.blake2b(b"".join(states), digest_size=1).digest()[0] % VOCABULARY
