"""What the server and the engine say to each other. Immutable; msgpack on the wire (`channel.py`)."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from nybble.engine.engine_config import EngineConfig
from nybble.engine.grammar.grammar import Grammar
from nybble.engine.sampling.thinking_limit import ThinkingBudget

FinishReason = Literal["stop", "length"]


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How the tokens of a request are chosen and when it ends.

    max_tokens 0 computes the prompt only; the token of its one event is no part of an answer.

    temperature 0 (or below 1e-5) is greedy; top_k 0, top_p 1 and min_p 0 are off. Without a seed the
    engine draws one. num_logprobs None gives no logprobs, n >= 0 gives the chosen token's and those of
    the n likeliest; num_prompt_logprobs the same for the prompt's tokens.

    Penalties and logit_bias, pairs of token id and number, are defined in `kernels/logit_adjustments.py`.
    allowed_token_ids, if given, are all that can come. Of bad_words, lists of tokens, none comes whole in an
    output, unless nothing else is left. A stop token does not come before there are min_tokens tokens. Both
    give way to a grammar that leaves nothing else, and all to the end of a thinking budget.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    thinking_budget: ThinkingBudget | None = None


class Request(Struct, frozen=True, kw_only=True, tag=True):
    """Generate after a prompt.

    priority: lower is sooner; tenant: whose request it is, among whom turns are fair; deadline: seconds from
    its arrival after which it ends with an error, None for never. Requests share the prefix cache with those
    of the same cache_salt only; with explain_cache the first event says what was not in it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    cache_salt: str = ""
    explain_cache: bool = False


class Abort(Struct, frozen=True, kw_only=True, tag=True):
    """Stop a request and forget it. Nothing is answered; an unknown id is ignored."""

    request_id: str


class TokenLogprobs(Struct, frozen=True, kw_only=True, gc=False):
    """Natural logarithms of probabilities before temperature and truncation.

    `top` lists (token id, logprob), likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class CacheExplanation(Struct, frozen=True, kw_only=True):
    """Why the prefix cache did not have more of a prompt than it had.

    different_token: the closest cached prefix, of the same salt, has another token at position
    first_differing_token. evicted: the next block was cached, and has been overwritten. never_seen: nothing
    cached goes on from there. last_block: all was there but the rest of less than a block, or the block of
    the last token, which is always computed. off: there is no prefix cache.
    """

    reason: Literal["different_token", "evicted", "never_seen", "last_block", "off"]
    first_differing_token: int | None = None


class RequestAccepted(Struct, frozen=True, kw_only=True, tag=True, gc=False):
    """A request was taken, so that it will not be refused any more. It may have to wait yet."""

    request_id: str


class TokenEvent(Struct, frozen=True, kw_only=True, tag=True, gc=False, omit_defaults=True):
    """One more token of a request; its last one carries the finish reason.

    queue_time: with the first token, the seconds from the request's arrival to the first step that ran it.
    """

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    num_cached_tokens: int
    cache_explanation: CacheExplanation | None = None
    queue_time: float | None = None


class PromptLogprobs(Struct, frozen=True, kw_only=True, tag=True, gc=False):
    """Of the next tokens of a request's prompt, from its second one on. All come before its first token."""

    request_id: str
    logprobs: tuple[TokenLogprobs, ...]


class RequestRefused(Struct, frozen=True, kw_only=True, tag=True):
    """A request that was not started.

    `parameter` is the field at fault; or `retry_after` says in how many seconds there may be room for it.
    """

    request_id: str
    message: str
    parameter: str | None = None
    retry_after: float | None = None


class RequestFailed(Struct, frozen=True, kw_only=True, tag=True):
    """A request that ended without its answer: its deadline has passed, or the engine failed at it."""

    request_id: str
    message: str
    kind: Literal["timeout", "internal"]


class EngineReady(Struct, frozen=True, kw_only=True, tag=True):
    """The engine has loaded. `config` has every "auto" resolved."""

    config: EngineConfig
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]


class EngineFailed(Struct, frozen=True, kw_only=True, tag=True):
    """The engine could not load, or cannot go on; the process ends after this."""

    message: str


class HistogramCounts(Struct, frozen=True, kw_only=True):
    """cumulative: how many values were at most each of `bounds`, and last how many in all; sum: of values."""

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    sum: float


class SpeculationStats(Struct, frozen=True, kw_only=True):
    """num_drafts, num_accepted: by the draft's position, since the start; a draft counts as accepted if all
    before it are. depth: drafts made for each sequence in the last step."""

    num_drafts: tuple[int, ...]
    num_accepted: tuple[int, ...]
    depth: int


class EngineStats(Struct, frozen=True, kw_only=True, tag=True):
    """A snapshot, sent when the engine goes idle and at most once a second while it runs.

    The first four are of the moment; all others count from the engine's start. Prompt tokens count when the
    first token of their request comes, and of them those found in the prefix cache. num_finished: requests by
    finish reason, or "abort". Histograms, in seconds unless said otherwise; those up to a last token and
    those of a request's tokens leave out requests that ended without a finish reason:

    queue_time: from arrival to the first step that runs the request
    time_to_first_token, request_time: from arrival to the first and to the last token
    inter_token_latency: from one token of a request to its next; those of one step come together
    prefill_time, inference_time: from the first step that runs the request to its first and to its last token
    decode_time: from the first token to the last
    time_per_output_token: that, for each token after the first, of requests that have any
    prompt_tokens, output_tokens: how many of them a request has
    step_time: from a step's launch to its tokens
    step_tokens, step_sequences: how many of them a step runs

    speculation is None where nothing is drafted.
    """

    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int
    num_steps: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_finished: dict[str, int]
    queue_time: HistogramCounts
    time_to_first_token: HistogramCounts
    inter_token_latency: HistogramCounts
    request_time: HistogramCounts
    prefill_time: HistogramCounts
    inference_time: HistogramCounts
    decode_time: HistogramCounts
    time_per_output_token: HistogramCounts
    prompt_tokens: HistogramCounts
    output_tokens: HistogramCounts
    step_time: HistogramCounts
    step_tokens: HistogramCounts
    step_sequences: HistogramCounts
    speculation: SpeculationStats | None = None


ToEngine = Request | Abort
StepEvent = TokenEvent | PromptLogprobs | RequestFailed
EngineEvent = StepEvent | RequestAccepted | RequestRefused
AnswerEvent = RequestAccepted | PromptLogprobs | TokenEvent  # what a request that does not fail gets
FromEngine = EngineReady | EngineFailed | EngineEvent | EngineStats
