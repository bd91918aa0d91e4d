"""An engine that plays a script: tokens, pauses, errors, death. It records what was asked and aborted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from nybble.engine.errors import EngineDeadError
from nybble.engine.messages import (
    AnswerEvent,
    CacheExplanation,
    EngineStats,
    FinishReason,
    PromptLogprobs,
    Request,
    RequestAccepted,
    TokenEvent,
    TokenLogprobs,
)


@dataclass(frozen=True)
class Emit:
    """A token; with `logprobs` None, `scripted_logprobs` if the request wants any."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Pause:
    """Waits for `resumed`; `reached` is set when the script comes here."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    resumed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Accept:
    """Says that the request was taken."""


@dataclass(frozen=True)
class Together:
    """Tokens that come at once."""

    tokens: Sequence[Emit | int]


Step = Together | int | Emit | Pause | Accept | Exception


class ScriptedEngine:
    """Plays the same script for every request. The last token carries `finish_reason`.

    An exception in the script is raised there; EngineDeadError also ends the engine's life.
    """

    def __init__(
        self,
        script: Sequence[Step],
        finish_reason: FinishReason = "stop",
        num_cached_tokens: int = 0,
        is_alive: bool = True,
        explanation: CacheExplanation | None = None,
    ) -> None:
        self._script = script
        self._finish_reason = finish_reason
        self._num_cached_tokens = num_cached_tokens
        self.is_alive = is_alive
        self._explanation = explanation
        self.stats: EngineStats | None = None
        self.last_token_time: float | None = None
        self.requests: list[Request] = []
        self.num_emitted = 0
        self.aborts: list[str] = []
        self.aborted = asyncio.Event()

    def play(self, script: Sequence[Step], finish_reason: FinishReason = "stop") -> None:
        """From the next request on."""
        self._script, self._finish_reason = script, finish_reason

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[AnswerEvent], None]:
        if not self.is_alive:
            raise EngineDeadError("the engine is not running")
        self.requests.append(request)
        is_finished = False
        try:
            if request.sampling.num_prompt_logprobs is not None:
                yield [_prompt_logprobs(request, request.sampling.num_prompt_logprobs)]
            for number, step in enumerate(self._script, 1):
                is_finished = number == len(self._script)
                match step:
                    case Pause():
                        step.reached.set()
                        await step.resumed.wait()
                    case Accept():
                        yield [RequestAccepted(request_id=request.request_id)]
                    case Exception():
                        is_finished = True
                        self.is_alive = not isinstance(step, EngineDeadError)
                        raise step
                    case Emit() | int():
                        yield self._events(request, [step], is_finished)
                    case Together(tokens):
                        yield self._events(request, tokens, is_finished)
        finally:
            if not is_finished:
                self.aborts.append(request.request_id)
                self.aborted.set()

    def _events(self, request: Request, tokens: Sequence[Emit | int], is_last: bool) -> list[TokenEvent]:
        self.num_emitted += len(tokens)
        self.last_token_time = time.monotonic()
        places = range(len(tokens))
        return [
            self._event(request, token, is_last and place == places[-1])
            for place, token in zip(places, tokens, strict=True)
        ]

    def _event(self, request: Request, step: Emit | int, is_last: bool) -> TokenEvent:
        token = step if isinstance(step, Emit) else Emit(step)
        logprobs = token.logprobs
        if logprobs is None and request.sampling.num_logprobs is not None:
            logprobs = scripted_logprobs(token.token_id, request.sampling.num_logprobs)
        return TokenEvent(
            request_id=request.request_id,
            token_id=token.token_id,
            logprobs=logprobs,
            finish_reason=self._finish_reason if is_last else None,
            num_cached_tokens=self._num_cached_tokens,
            cache_explanation=self._explanation if request.explain_cache else None,
        )


def _prompt_logprobs(request: Request, num_top: int) -> PromptLogprobs:
    logprobs = tuple(scripted_logprobs(token_id, num_top) for token_id in request.prompt_token_ids[1:])
    return PromptLogprobs(request_id=request.request_id, logprobs=logprobs)


def scripted_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """Values that tell tokens apart; the likeliest tokens are the chosen one and those after it."""
    logprob = -token_id / 64
    return TokenLogprobs(logprob=logprob, top=tuple((token_id + n, logprob - n) for n in range(num_top)))
