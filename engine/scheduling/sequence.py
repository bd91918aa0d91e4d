"""A request while it runs."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from nybble.engine.messages import CacheExplanation, FinishReason, Request, SamplingParams
from nybble.engine.sampling.logit_rules import LogitRules
from nybble.engine.sampling.prompt_scores import PromptScores
from nybble.engine.scheduling.block_pool import hash_block, hash_salt
from nybble.engine.scheduling.block_table import BlockTable


class Sequence:
    """Tokens of a request, and how far their keys and values are computed.

    Between steps, tokens [0, num_computed) lie in `blocks`; those from num_computed on are still to be
    run. While decoding that is one token: the last one sampled. `drafts` are guesses of the tokens to come,
    set between steps and run with that one token; they are not among `token_ids`.
    """

    def __init__(
        self,
        request: Request,
        sampling: SamplingParams,
        block_size: int,
        rules: LogitRules | None = None,
        block_lookahead: int = 0,
    ) -> None:
        """block_lookahead: how many tokens after a block its keys and values depend on."""
        self.request_id = request.request_id
        self.priority = request.priority
        self.tenant = request.tenant
        self.arrival = 0  # its place among all sequences, given by the scheduler
        self.sampling = sampling
        self.rules = rules
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed = 0
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache at first admission
        self.was_admitted = False
        self.explains_cache = request.explain_cache
        self.cache_explanation: CacheExplanation | None = None  # until an event takes it
        self.queue_time: float | None = None  # seconds, until an event takes it
        num_top = sampling.num_prompt_logprobs
        self.scores = None if num_top is None else PromptScores(request.prompt_token_ids, num_top)
        self.finish_reason: FinishReason | None = None
        self.drafts: tuple[int, ...] = ()
        self.blocks = BlockTable()
        self._block_size = block_size
        self._salt_hash = hash_salt(request.cache_salt)
        self._block_lookahead = block_lookahead
        self._block_tokens: list[array[int]] = []  # int32, of the blocks that are hashed
        self._block_hashes: list[bytes] = []

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        return self.num_uncomputed == 1 and len(self.token_ids) > self.num_prompt_tokens

    @property
    def is_scoring(self) -> bool:
        """Whether log-probabilities of its prompt are still to be found."""
        return self.scores is not None and not self.scores.is_complete

    @property
    def num_reusable(self) -> int:
        """Tokens that need not be computed if their keys and values are cached: nobody wants their logits."""
        num_done = len(self.token_ids)
        if self.scores is not None and not self.scores.is_complete:
            num_done = self.scores.num_scored
        return num_done - 1

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def useful_drafts(self) -> tuple[int, ...]:
        """The drafts that can be accepted while leaving a token to sample."""
        if not self.is_decoding:
            return ()
        return self.drafts[: self.sampling.max_tokens - self.num_output_tokens - 1]

    @property
    def num_full_blocks(self) -> int:
        """Blocks with keys and values that no later token changes."""
        num_known = len(self.token_ids) - self._block_lookahead
        return min(self.num_computed, num_known) // self._block_size

    def begin(self, num_cached_tokens: int) -> None:
        """Start to compute after a prefix whose keys and values `blocks` already holds."""
        self.num_computed = num_cached_tokens
        if not self.was_admitted:
            self.was_admitted = True
            self.num_cached_tokens = num_cached_tokens

    def block_hash(self, index: int) -> bytes:
        """Hash of a full block, and of what it depends on, chained to those before it. Computed once."""
        while len(self._block_hashes) <= index:
            start = len(self._block_hashes) * self._block_size
            end = start + self._block_size + self._block_lookahead
            token_ids = array("i", self.token_ids[start:end])
            previous = self._block_hashes[-1] if self._block_hashes else self._salt_hash
            self._block_tokens.append(token_ids)
            self._block_hashes.append(hash_block(previous, token_ids))
        return self._block_hashes[index]

    def hash_before(self, index: int) -> bytes:
        """Hash of the block before one; of the first, that of the cache salt."""
        return self.block_hash(index - 1) if index else self._salt_hash

    def tokens_of_block(self, index: int) -> array[int]:
        """Those that its keys and values depend on, of the block and after it, which must be hashed."""
        return self._block_tokens[index]

    def block_hashes(self, count: int) -> Iterator[bytes]:
        """Those of the first `count` blocks, computed as far as they are asked for."""
        return map(self.block_hash, range(count))

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token; returns why the sequence ends with it, if it does."""
        self.token_ids.append(token_id)
        if self.rules is not None:
            self.rules.append(token_id)
        if token_id in self.sampling.stop_token_ids and self.sampling.max_tokens:
            self.finish_reason = "stop"
        elif self.num_output_tokens >= self.sampling.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason
