"""One chat completion: run it on the engine, and shape what comes back."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from msgspec import UNSET

from nybble.engine.engine_client import EngineClient
from nybble.engine.messages import Request
from nybble.server.chat_request import ChatRequest
from nybble.server.prices import Prices
from nybble.server.schemas import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    LogprobEntry,
    MessageDelta,
    PromptTokensDetails,
    Usage,
)
from nybble.server.served_model import ServedModel
from nybble.server.text_stream import Delta, TextStream


class Completion:
    """Iterate `deltas` to run it; `usage` then tells what was used so far."""

    def __init__(
        self, request: ChatRequest, engine: EngineClient, model: ServedModel, prices: Prices
    ) -> None:
        self.completion_id = f"chatcmpl-{uuid.uuid4().hex}"
        self._request = request
        self._engine = engine
        self._model = model
        self._prices = prices
        self._created = int(time.time())
        self._num_completion = 0
        self._num_cached = 0

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The pieces of the answer. Closing this early, or a stop string, aborts the request."""
        text_stream = TextStream(self._model.tokenizer, self._request.stop_strings)
        request = Request(
            request_id=self.completion_id,
            prompt_token_ids=self._request.prompt_token_ids,
            sampling=self._request.sampling,
        )
        async with aclosing(self._engine.generate(request)) as events:
            async for event in events:
                self._num_completion += 1
                self._num_cached = event.num_cached_tokens
                delta = text_stream.feed(event)
                yield delta
                if delta.finish_reason is not None:
                    return

    def usage(self) -> Usage:
        num_prompt = len(self._request.prompt_token_ids)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_completion,
            total_tokens=num_prompt + self._num_completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached),
            estimated_cost=self._prices.cost(num_prompt, self._num_cached, self._num_completion),
        )

    async def whole(self) -> ChatCompletion:
        """The answer in one piece: the same deltas, folded."""
        text, logprobs, finish_reason = "", list[LogprobEntry](), ""
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                text += delta.text
                logprobs += delta.logprobs
                finish_reason = delta.finish_reason or ""
        return ChatCompletion(
            id=self.completion_id,
            created=self._created,
            model=self._model.name,
            choices=[
                Choice(
                    message=AssistantMessage(content=text),
                    logprobs=self._choice_logprobs(logprobs),
                    finish_reason=finish_reason,
                )
            ],
            usage=self.usage(),
        )

    async def chunks(self) -> AsyncGenerator[ChatCompletionChunk, None]:
        """The answer as it comes: role, pieces of content, finish reason, usage if asked for."""
        is_first = True
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                if is_first:
                    yield self._chunk(ChunkChoice(delta=MessageDelta(role="assistant", content="")))
                    is_first = False
                if delta.text:
                    logprobs = self._choice_logprobs(delta.logprobs)
                    content = MessageDelta(content=delta.text)
                    yield self._chunk(ChunkChoice(delta=content, logprobs=logprobs))
                if delta.finish_reason is not None:
                    reason = delta.finish_reason
                    yield self._chunk(ChunkChoice(delta=MessageDelta(), finish_reason=reason))
        if self._request.include_usage:
            yield self._chunk(None)

    def _chunk(self, choice: ChunkChoice | None) -> ChatCompletionChunk:
        """A chunk of one choice, or the last one, which has the usage instead."""
        usage = None if choice else self.usage()
        return ChatCompletionChunk(
            id=self.completion_id,
            created=self._created,
            model=self._model.name,
            choices=[choice] if choice else [],
            usage=usage if self._request.include_usage else UNSET,
        )

    def _choice_logprobs(
        self, entries: list[LogprobEntry] | tuple[LogprobEntry, ...]
    ) -> ChoiceLogprobs | None:
        if self._request.sampling.num_logprobs is None:
            return None
        return ChoiceLogprobs(content=list(entries))
