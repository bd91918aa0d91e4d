"""Which sequences run in the next step, with how many tokens each.

Continuous batching under a budget of tokens a step:

1. Each decoding sequence gets its one token, and drafts along with it while budget and blocks are left.
   Where there are prompts to compute, a quarter of the budget is theirs: if that leaves less than a token for
   each decode, decodes go by rotation.
2. Prompts share the rest in turns of at most a quarter of a step's budget (`prompt_queue.py`). A waiting
   sequence is admitted when its turn comes, if blocks for all of its tokens are free, and one to grow into
   for each that runs; if not, nobody overtakes it until they are.

When blocks run out, the sequence of the worst priority, of those the last to arrive, is preempted: its blocks
are released, and it waits to be computed again, largely from the prefix cache. The scheduler sees integers
only.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence

from nybble.engine.engine_config import SchedulerConfig
from nybble.engine.engine_stats import Gauges
from nybble.engine.messages import TokenEvent
from nybble.engine.scheduling.block_pool import BlockPool
from nybble.engine.scheduling.fair_share import FairShare
from nybble.engine.scheduling.prediction import Prediction, predict
from nybble.engine.scheduling.prefix_cache import PrefixCache
from nybble.engine.scheduling.prompt_queue import PromptQueue
from nybble.engine.scheduling.sequence import Sequence
from nybble.engine.scheduling.sequence_blocks import SequenceBlocks
from nybble.engine.scheduling.step import Chunk, SampledToken, StepPlan
from nybble.engine.scheduling.step_budget import StepBudget

_TURNS_IN_STEP = 4  # a turn is this part of a step's budget, as is what decodes leave to prompts
_MAX_LAG = 4  # in steps' budgets: how far a tenant may fall behind and still catch up


class Scheduler:
    """Owns the sequences and their blocks. A sequence is waiting or running, or unknown here."""

    def __init__(
        self,
        config: SchedulerConfig,
        block_pool: BlockPool,
        block_size: int,
        enable_prefix_caching: bool,
        num_speculative_tokens: int = 0,
    ) -> None:
        """num_speculative_tokens: drafts that a step may be followed by."""
        self._config = config
        self._pool = block_pool
        self._block_size = block_size
        self._blocks = SequenceBlocks(block_pool, block_size)
        self._cache = PrefixCache(block_pool, block_size, enable_prefix_caching)
        self._lookahead = max(num_speculative_tokens - 1, 0)  # slots that guesses from guesses take
        self._shares = FairShare(_MAX_LAG * config.max_num_batched_tokens)
        self._prompts = PromptQueue(self._shares)
        self._sequences: dict[str, Sequence] = {}
        self._decoding: dict[Sequence, None] = {}
        self._arrivals = itertools.count()
        self._blocked: tuple[Sequence | None, int] = None, 0  # was not admitted, with so many blocks free
        self.running: dict[Sequence, None] = {}  # decoding or prefilling, in order of admission
        self.num_preemptions = 0
        self._admitted: list[str] = []
        self._prediction: Prediction | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def num_waiting(self) -> int:
        return self._prompts.num_waiting

    def waiting(self) -> Iterator[Sequence]:
        """In no order."""
        return self._prompts.waiting()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = next(self._arrivals)
        num_tokens = self._num_to_compute(sequence)
        self._sequences[sequence.request_id] = sequence
        self._shares.arrive(sequence.tenant)
        self._prompts.add(sequence, num_tokens)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks. An unknown one is ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._take_out(sequence)
            self._shares.leave(sequence.tenant)

    def schedule(self) -> StepPlan:
        """Plan a step, allocating the blocks that it writes to. That is what was predicted, if it holds."""
        prediction, self._prediction = self._prediction, None
        if prediction is not None and not self._has_prompts:
            plan = prediction.confirm(self._decoding)
            if plan is not None:
                self._charge_decodes(self._decoding)
                return plan
        step = StepBudget(self._config.max_num_batched_tokens, self._prompt_reserve())
        num_preemptions = self.num_preemptions
        self._schedule_decodes(step)
        self._schedule_drafts(step)
        # A victim that came straight back for the blocks that are left would be preempted again.
        self._schedule_prompts(step, can_admit=self.num_preemptions == num_preemptions)
        self._make_room_for_drafts(step)
        chunks = (self._chunk(s, count, step.num_drafts.get(s, 0)) for s, count in step.num_tokens.items())
        return StepPlan(tuple(chunks))

    def predict(self, plan: StepPlan) -> StepPlan | None:
        """What comes after a step that is being run, if that can be foreseen; its token ids are yet to come.
        If it holds, `schedule` returns the same object."""
        has_room = len(self._decoding) <= self._config.max_num_batched_tokens
        if self._has_prompts or not has_room:
            return None
        self._prediction = predict(plan, self._sequences, self._blocks.grow_all)
        return None if self._prediction is None else self._prediction.plan

    def update(self, plan: StepPlan, sampled: AbstractSequence[tuple[SampledToken, ...]]) -> list[TokenEvent]:
        """Append what a plan sampled, in its order; returns an event for each token.

        sampled: for each sampling chunk the accepted drafts, then the next token. Those after one that ends
        the sequence are dropped, as are all of a sequence that was aborted since it was planned.
        """
        tokens = {c.request_id: tokens for c, tokens in zip(plan.sampling_chunks, sampled, strict=True)}
        events: list[TokenEvent] = []
        for chunk in plan.chunks:
            sequence = self._sequences.get(chunk.request_id)
            if sequence in self.running:
                events += self._advance(sequence, chunk, tokens.get(chunk.request_id, ()))
        return events

    def take_drafts(self, drafts: Mapping[str, tuple[int, ...]]) -> None:
        """For the next step, by request; those that are not running are ignored."""
        for request_id, guesses in drafts.items():
            sequence = self._sequences.get(request_id)
            if sequence in self._decoding:
                sequence.drafts = guesses

    def take_admitted(self) -> list[str]:
        """Requests that were admitted for the first time since this was last asked."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def note_waits(self, waits: Mapping[str, float]) -> None:
        """How many seconds requests have waited that are now running, for their first events."""
        for request_id, seconds in waits.items():
            self._sequences[request_id].queue_time = seconds

    def gauges(self) -> Gauges:
        return Gauges(
            num_waiting=self.num_waiting,
            num_running=len(self.running),
            num_blocks=self._pool.num_blocks,
            num_free_blocks=self._pool.num_free,
            num_preemptions=self.num_preemptions,
        )

    def check(self) -> None:
        """Assert that no block or sequence is lost. For tests, and when idle."""
        waiting = set(self.waiting())
        if any(len(sequence.blocks) for sequence in waiting):
            raise AssertionError("a waiting sequence owns blocks")
        if waiting | self.running.keys() != set(self._sequences.values()) or waiting & self.running.keys():
            raise AssertionError("a sequence is not either waiting or running")
        if len(self._decoding) + self._prompts.num_prefilling != len(self.running):
            raise AssertionError("a running sequence is not either decoding or prefilling")
        self._pool.check(sequence.blocks.tolist() for sequence in self.running)

    # Decodes.

    @property
    def _has_prompts(self) -> bool:
        """Whether there are prompts to compute that have, or could have, a place among those that run."""
        has_slot = len(self.running) < self._config.max_num_seqs
        return bool(self._prompts.num_prefilling or (self._prompts.num_waiting and has_slot))

    def _prompt_reserve(self) -> int:
        """Tokens of a step's budget that decodes leave to prompts."""
        return self._config.max_num_batched_tokens // _TURNS_IN_STEP if self._has_prompts else 0

    def _schedule_decodes(self, step: StepBudget) -> None:
        decodes = list(self._decoding)[: step.left_for_decodes]
        if len(decodes) < len(self._decoding):
            self._rotate(decodes)
        for sequence in decodes:
            if sequence in self.running:  # not preempted meanwhile
                self._schedule_decode(sequence, step)
        self._charge_decodes(step.num_tokens)

    def _charge_decodes(self, sequences: Iterable[Sequence]) -> None:
        for tenant, count in Counter([sequence.tenant for sequence in sequences]).items():
            self._shares.charge(tenant, count)

    def _rotate(self, decodes: AbstractSequence[Sequence]) -> None:
        """Put those that run now behind those that do not."""
        for sequence in decodes:
            self._decoding[sequence] = self._decoding.pop(sequence)

    def _schedule_decode(self, sequence: Sequence, step: StepBudget) -> None:
        while not self._blocks.grow(sequence, sequence.num_computed + 1):
            victim = max(self.running, key=lambda running: (running.priority, running.arrival))
            step.remove(victim)
            self._preempt(victim)
            if victim is sequence:
                return
        step.add(sequence, 1)

    def _schedule_drafts(self, step: StepBudget) -> None:
        """Let drafts run along if nobody has to give way for them."""
        for sequence in step.num_tokens:
            drafts = sequence.useful_drafts[: step.left_for_decodes] if sequence.drafts else ()
            if drafts and self._blocks.grow(sequence, sequence.num_computed + 1 + len(drafts)):
                step.add_drafts(sequence, len(drafts))
                self._shares.charge(sequence.tenant, len(drafts))

    def _make_room_for_drafts(self, step: StepBudget) -> None:
        """Slots where the draft layer can guess from its own guesses, if nobody has to give way for them."""
        if self._lookahead:
            for sequence, count in step.num_tokens.items():
                end = sequence.num_computed + count + step.num_drafts.get(sequence, 0)
                self._blocks.grow(sequence, end + self._lookahead)

    def _preempt(self, sequence: Sequence) -> None:
        self._take_out(sequence)
        sequence.num_computed = 0
        sequence.drafts = ()
        self._prompts.add(sequence, self._num_to_compute(sequence))
        self.num_preemptions += 1

    # Prompts.

    def _schedule_prompts(self, step: StepBudget, can_admit: bool) -> None:
        turn = max(self._config.max_num_batched_tokens // _TURNS_IN_STEP, 1)
        while step.left:
            can_admit = can_admit and len(self.running) < self._config.max_num_seqs
            sequence = self._prompts.next(can_admit)
            if sequence is None:
                return
            if sequence not in self.running and not self._admit(sequence):
                can_admit = False
                continue
            num_left = sequence.num_uncomputed - step.num_tokens.get(sequence, 0)
            count = min(num_left, turn, step.most_for(sequence))
            if not count:
                return
            step.add(sequence, count)
            self._shares.charge(sequence.tenant, count)
            self._prompts.end_turn(sequence, num_left - count, can_admit)

    def _num_to_compute(self, sequence: Sequence) -> int:
        """Of a waiting sequence, if it were admitted now."""
        return len(sequence.token_ids) - len(self._cache.find(sequence)) * self._block_size

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its cached prefix, and blocks for the rest; False if too few are free."""
        blocked, num_free = self._blocked
        if sequence is blocked and self._pool.num_free <= num_free:
            return False  # without looking for its prefix again, which may be long
        cached = self._cache.find(sequence)
        needed = self._blocks.count_for(len(sequence.token_ids)) - len(cached)
        if needed + len(self.running) > self._pool.num_free - self._pool.num_free_among(cached):
            self._blocked = sequence, self._pool.num_free
            return False
        self._blocked = None, 0
        self._pool.acquire(cached)
        sequence.blocks.extend(cached + self._pool.allocate(needed))
        if not sequence.was_admitted:
            self._admitted.append(sequence.request_id)
            if sequence.explains_cache:
                sequence.cache_explanation = self._cache.explain(sequence, len(cached))
        sequence.begin(len(cached) * self._block_size)
        self.running[sequence] = None
        self._prompts.admit(sequence, sequence.num_uncomputed)
        return True

    # Both.

    def _chunk(self, sequence: Sequence, count: int, num_drafts: int) -> Chunk:
        start, is_last = sequence.num_computed, count == sequence.num_uncomputed
        num_blocks = self._blocks.count_for(start + count + num_drafts + self._lookahead)
        token_ids = sequence.token_ids[start : start + count]
        return Chunk(
            request_id=sequence.request_id,
            token_ids=token_ids + list(sequence.drafts[:num_drafts]) if num_drafts else token_ids,
            start=start,
            blocks=sequence.blocks.array[:num_blocks],
            sampling=sequence.sampling if is_last else None,
            num_drafts=num_drafts,
            next_token_id=None if is_last else sequence.token_ids[start + count],
            rules=sequence.rules,
            scores=sequence.scores if sequence.is_scoring else None,
        )

    def _advance(
        self, sequence: Sequence, chunk: Chunk, tokens: tuple[SampledToken, ...]
    ) -> list[TokenEvent]:
        """Take a chunk's result: its keys and values stay valid up to the last accepted draft."""
        if (chunk.sampling is not None) != (1 <= len(tokens) <= chunk.num_drafts + 1):
            raise ValueError(f"{len(tokens)} tokens for {chunk.num_drafts} drafts of {chunk.request_id}")
        events = [_append(sequence, token) for token in tokens if not sequence.is_finished]
        num_accepted = min(len(events), max(len(tokens) - 1, 0))
        sequence.num_computed = chunk.start + len(chunk.token_ids) - chunk.num_drafts + num_accepted
        sequence.drafts = ()
        self._cache.keep(sequence, chunk.start)
        if sequence.is_finished:
            self.abort(sequence.request_id)
        elif tokens:
            self._decoding[sequence] = None
        return events

    def _take_out(self, sequence: Sequence) -> None:
        """Out of all groups, its blocks freed."""
        self._prompts.remove(sequence)
        self._decoding.pop(sequence, None)
        self.running.pop(sequence, None)
        self._blocks.release(sequence)


def _append(sequence: Sequence, token: SampledToken) -> TokenEvent:
    explanation, sequence.cache_explanation = sequence.cache_explanation, None
    queue_time, sequence.queue_time = sequence.queue_time, None
    return TokenEvent(
        request_id=sequence.request_id,
        token_id=token.token_id,
        logprobs=token.logprobs,
        finish_reason=sequence.append(token.token_id),
        num_cached_tokens=sequence.num_cached_tokens,
        cache_explanation=explanation,
        queue_time=queue_time,
    )
