"""What the server and the engine say to each other. Immutable; msgpack on the wire (`channel.py`)."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from nybble.engine.engine_config import EngineConfig

FinishReason = Literal["stop", "length"]


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How the tokens of a request are chosen and when it ends.

    temperature 0 (or below 1e-5) is greedy; top_k 0, top_p 1 and min_p 0 are off. Without a seed the
    engine draws one. num_logprobs None gives no logprobs, n >= 0 gives the chosen token's and those of
    the n likeliest.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None


class Request(Struct, frozen=True, kw_only=True, tag=True):
    """Generate after a prompt."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams


class Abort(Struct, frozen=True, kw_only=True, tag=True):
    """Stop a request and forget it. Nothing is answered; an unknown id is ignored."""

    request_id: str


class TokenLogprobs(Struct, frozen=True, kw_only=True, gc=False):
    """Natural logarithms of probabilities before temperature and truncation.

    `top` lists (token id, logprob), likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenEvent(Struct, frozen=True, kw_only=True, tag=True, gc=False):
    """One more token of a request; its last one carries the finish reason."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    num_cached_tokens: int


class RequestRefused(Struct, frozen=True, kw_only=True, tag=True):
    """A request that was not started. `parameter` is the field at fault."""

    request_id: str
    message: str
    parameter: str


class EngineReady(Struct, frozen=True, kw_only=True, tag=True):
    """The engine has loaded. `config` has every "auto" resolved."""

    config: EngineConfig
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]


class EngineFailed(Struct, frozen=True, kw_only=True, tag=True):
    """The engine could not load; the process ends after this."""

    message: str


class EngineStats(Struct, frozen=True, kw_only=True, tag=True):
    """A snapshot, sent when the engine goes idle and at most once a second while it runs."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int


ToEngine = Request | Abort
FromEngine = EngineReady | EngineFailed | TokenEvent | RequestRefused | EngineStats
EngineEvent = TokenEvent | RequestRefused
