"""Which sequences run in the next step, with how many tokens each.

Continuous batching: each step gives every decoding sequence its one token, then spends the rest of
the token budget on prompts, in order of arrival, in chunks. When blocks run out, the sequence that
was admitted last is preempted: its blocks are released and it waits at the head of the queue, to be
computed again (largely from the prefix cache). A decoding sequence's drafts run along with its token
while there are budget and blocks for them. The scheduler sees integers only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as AbstractSequence

from nybble.engine.block_pool import BlockPool, OutOfBlocksError
from nybble.engine.engine_config import SchedulerConfig
from nybble.engine.engine_stats import Gauges
from nybble.engine.messages import TokenEvent
from nybble.engine.sequence import Sequence
from nybble.engine.step import Chunk, SampledToken, StepPlan


class Scheduler:
    """Owns the sequences and their blocks. A sequence is waiting or running, or unknown here."""

    def __init__(
        self,
        config: SchedulerConfig,
        block_pool: BlockPool,
        block_size: int,
        enable_prefix_caching: bool,
    ) -> None:
        self._config = config
        self._pool = block_pool
        self._block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self._admitted: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks. An unknown one is ignored."""
        for sequence in self.running:
            if sequence.request_id == request_id:
                self.finish(sequence)
                return
        self.waiting = deque(s for s in self.waiting if s.request_id != request_id)

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free its blocks."""
        self.running.remove(sequence)
        self._release(sequence)

    def schedule(self) -> StepPlan:
        """Plan a step, allocating the blocks that it writes to."""
        step = _Step(self._config.max_num_batched_tokens)
        num_preemptions = self.num_preemptions
        for sequence in self._running_decodes_first():
            if sequence in self.running:  # not preempted meanwhile
                self._schedule_running(sequence, step)
        for sequence in list(step.num_tokens):
            self._schedule_drafts(sequence, step)
        if self.num_preemptions == num_preemptions:
            self._admit_waiting(step)
        return StepPlan(tuple(_chunk(s, n, step.num_drafts.get(s, 0)) for s, n in step.num_tokens.items()))

    def update(self, plan: StepPlan, sampled: AbstractSequence[tuple[SampledToken, ...]]) -> list[TokenEvent]:
        """Append what a plan sampled, in its order; returns an event for each token.

        sampled: for each sampling chunk the accepted drafts, then the next token. Those after one that ends
        the sequence are dropped.
        """
        by_id = {sequence.request_id: sequence for sequence in self.running}
        tokens = {c.request_id: tokens for c, tokens in zip(plan.sampling_chunks, sampled, strict=True)}
        events: list[TokenEvent] = []
        for chunk in plan.chunks:
            events += self._advance(by_id[chunk.request_id], chunk, tokens.get(chunk.request_id, ()))
        return events

    def _advance(
        self, sequence: Sequence, chunk: Chunk, tokens: tuple[SampledToken, ...]
    ) -> list[TokenEvent]:
        """Take a chunk's result: its keys and values stay valid up to the last accepted draft."""
        if (chunk.sampling is not None) != (1 <= len(tokens) <= chunk.num_drafts + 1):
            raise ValueError(f"{len(tokens)} tokens for {chunk.num_drafts} drafts of {chunk.request_id}")
        events = [self._append(sequence, token) for token in tokens if not sequence.is_finished]
        num_accepted = min(len(events), max(len(tokens) - 1, 0))
        sequence.num_computed = chunk.start + len(chunk.token_ids) - chunk.num_drafts + num_accepted
        sequence.drafts = ()
        self._register_full_blocks(sequence, chunk.start)
        if sequence.is_finished:
            self.finish(sequence)
        return events

    def _append(self, sequence: Sequence, token: SampledToken) -> TokenEvent:
        return TokenEvent(
            request_id=sequence.request_id,
            token_id=token.token_id,
            logprobs=token.logprobs,
            finish_reason=sequence.append(token.token_id),
            num_cached_tokens=sequence.num_cached_tokens,
        )

    def take_admitted(self) -> list[str]:
        """Requests that were admitted for the first time since this was last asked."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def gauges(self) -> Gauges:
        return Gauges(
            num_waiting=len(self.waiting),
            num_running=len(self.running),
            num_blocks=self._pool.num_blocks,
            num_free_blocks=self._pool.num_free,
            num_preemptions=self.num_preemptions,
        )

    def check(self) -> None:
        """Assert the block pool's invariants. For tests, and when idle."""
        waiting_blocks = [s.blocks for s in self.waiting if s.blocks]
        if waiting_blocks:
            raise AssertionError("a waiting sequence owns blocks")
        self._pool.check(sequence.blocks for sequence in self.running)

    def _running_decodes_first(self) -> list[Sequence]:
        return sorted(self.running, key=lambda sequence: not sequence.is_decoding)

    def _schedule_running(self, sequence: Sequence, step: _Step) -> None:
        count = min(sequence.num_uncomputed, step.budget)
        while count and not self._grow(sequence, sequence.num_computed + count):
            victim = self.running[-1]
            step.remove(victim)
            self._preempt(victim)
            if victim is sequence:
                return
        step.add(sequence, count)

    def _schedule_drafts(self, sequence: Sequence, step: _Step) -> None:
        """Let a planned sequence's drafts run if nobody has to give way for them."""
        drafts = sequence.useful_drafts[: step.budget]
        num_tokens = sequence.num_computed + step.num_tokens[sequence] + len(drafts)
        if drafts and self._grow(sequence, num_tokens):
            step.add_drafts(sequence, len(drafts))

    def _admit_waiting(self, step: _Step) -> None:
        while self.waiting and step.budget and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[0]
            count = self._admit(sequence, step.budget)
            if not count:
                return
            self.waiting.popleft()
            self.running.append(sequence)
            step.add(sequence, count)

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Give a waiting sequence its cached prefix and new blocks; returns the tokens to run, or 0."""
        cached = self._find_cached_prefix(sequence)
        num_cached = len(cached) * self._block_size
        count = min(len(sequence.token_ids) - num_cached, budget)
        needed = self._blocks_for(num_cached + count) - len(cached)
        if needed > self._pool.num_free - self._pool.num_free_among(cached):
            return 0
        self._pool.acquire(cached)
        sequence.blocks = cached + self._pool.allocate(needed)
        sequence.num_computed = num_cached
        if not sequence.was_admitted:
            sequence.was_admitted = True
            self._admitted.append(sequence.request_id)
            sequence.num_cached_tokens = num_cached
        return count

    def _find_cached_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence, short of its last token, whose logits are wanted."""
        if not self._enable_prefix_caching:
            return []
        num_full = (len(sequence.token_ids) - 1) // self._block_size
        return self._pool.find_prefix(sequence.block_hashes(num_full))

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend a sequence's blocks to hold `num_tokens`; False if too few are free."""
        needed = self._blocks_for(num_tokens) - len(sequence.blocks)
        try:
            sequence.blocks += self._pool.allocate(max(needed, 0))
        except OutOfBlocksError:
            return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.finish(sequence)
        sequence.num_computed = 0
        sequence.drafts = ()
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []

    def _register_full_blocks(self, sequence: Sequence, start: int) -> None:
        """Make findable the blocks that were filled since position `start`."""
        if not self._enable_prefix_caching:
            return
        first, end = start // self._block_size, sequence.num_computed // self._block_size
        hashes = sequence.block_hashes(end)
        for index in range(first, end):
            self._pool.register(sequence.blocks[index], hashes[index])

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)


class _Step:
    """Tokens given to each sequence so far, and what is left of the budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_tokens: dict[Sequence, int] = {}
        self.num_drafts: dict[Sequence, int] = {}  # beyond those

    def add(self, sequence: Sequence, count: int) -> None:
        if count:
            self.num_tokens[sequence] = count
            self.budget -= count

    def add_drafts(self, sequence: Sequence, count: int) -> None:
        self.num_drafts[sequence] = count
        self.budget -= count

    def remove(self, sequence: Sequence) -> None:
        self.budget += self.num_tokens.pop(sequence, 0)


def _chunk(sequence: Sequence, count: int, num_drafts: int) -> Chunk:
    start = sequence.num_computed
    return Chunk(
        request_id=sequence.request_id,
        token_ids=sequence.token_ids[start : start + count] + list(sequence.drafts[:num_drafts]),
        start=start,
        blocks=sequence.blocks,
        sampling=sequence.sampling if count == sequence.num_uncomputed else None,
        num_drafts=num_drafts,
        rules=sequence.rules,
    )
