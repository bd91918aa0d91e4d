"""One chat completion: run its choices on the engine, and shape what comes back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from msgspec import UNSET, UnsetType

from nybble.engine.engine_client import EngineClient
from nybble.engine.messages import CacheExplanation, Request, TokenEvent
from nybble.server.access.prices import Prices
from nybble.server.chat.answer_message import AnswerMessage, MessageDeltas
from nybble.server.chat.answer_parser import AnswerParser
from nybble.server.chat.answer_stream import AnswerDelta, AnswerStream
from nybble.server.chat.chat_request import ChatRequest
from nybble.server.chat.replay_store import ReplayStore
from nybble.server.requests.sampling_options import choice_sampling
from nybble.server.requests.schemas import (
    CacheMiss,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    CompletionTokensDetails,
    LogprobEntry,
    MessageDelta,
    PromptTokensDetails,
    Timings,
    Usage,
)
from nybble.server.served_model import ServedModel
from nybble.server.text.choices import run_choices
from nybble.server.text.request_timer import RequestTimer
from nybble.server.text.text_stream import TextStream


class Completion:
    """Iterate `deltas` to run it; `usage` then tells what was used so far.

    accepted: set when the engine has taken the request.
    """

    def __init__(
        self,
        request: ChatRequest,
        engine: EngineClient,
        model: ServedModel,
        prices: Prices,
        replay: ReplayStore,
    ) -> None:
        self.completion_id = f"chatcmpl-{uuid.uuid4().hex}"
        self._request = request
        self._engine = engine
        self._model = model
        self._prices = prices
        self._replay = replay
        self._created = int(time.time())
        self._timer = RequestTimer()
        self.accepted = asyncio.Event()
        self._num_completion = 0
        self._num_reasoning = 0
        self._num_cached = 0
        self._explanation: CacheExplanation | None = None

    def deltas(self) -> AsyncGenerator[tuple[int, AnswerDelta], None]:
        """The pieces of the answers, each with the number of its choice. Closing this early aborts all."""
        return run_choices(self._choice, self._request.num_choices)

    async def _choice(self, number: int) -> AsyncGenerator[AnswerDelta, None]:
        """Run one. Closing this early, or a stop string, aborts it."""
        asked = self._request
        answer = AnswerStream(
            TextStream(self._model.tokenizer, asked.stop_strings, asked.sampling.min_tokens),
            AnswerParser(
                asked.has_thinking, asked.is_thinking, asked.tools.call_rules() if asked.tools else None
            ),
        )
        request = Request(
            request_id=f"{self.completion_id}-{number}" if number else self.completion_id,
            prompt_token_ids=asked.prompt_token_ids,
            sampling=choice_sampling(asked.sampling, number),
            priority=asked.priority,
            deadline=self._timer.time_left(asked.timeout),
            cache_salt=asked.cache_salt,
            explain_cache=asked.explain_cache and number == 0,
        )
        token_ids, texts = list[int](), list[str]()
        async with aclosing(self._engine.generate(request)) as groups:
            async for events in groups:
                tokens = [event for event in events if isinstance(event, TokenEvent)]
                if len(tokens) < len(events):
                    self.accepted.set()
                if not tokens:
                    continue
                self._timer.note_token(tokens[0], ends_prompt=number == 0 and not token_ids)
                if number == 0:  # the others find what it has computed
                    self._num_cached = tokens[0].num_cached_tokens
                    self._explanation = self._explanation or tokens[0].cache_explanation
                delta = answer.feed(tokens)
                self._num_completion += delta.num_tokens
                self._num_reasoning += delta.num_reasoning_tokens
                token_ids += [event.token_id for event in tokens[: delta.num_tokens]]
                texts.append(delta.text)
                if delta.finish_reason is not None:
                    text = "".join(texts)
                    self._replay.remember(asked.cache_salt, asked.prompt_token_ids, token_ids, text)
                yield delta
                if delta.finish_reason is not None:
                    return

    def usage(self) -> Usage:
        """Of all choices together; the prompt counts once."""
        num_prompt = len(self._request.prompt_token_ids)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_completion,
            total_tokens=num_prompt + self._num_completion,
            prompt_tokens_details=PromptTokensDetails(self._num_cached, self._cache_miss()),
            completion_tokens_details=CompletionTokensDetails(self._num_reasoning),
            estimated_cost=self._prices.cost(num_prompt, self._num_cached, self._num_completion),
        )

    def _timings(self) -> Timings:
        return self._timer.timings(
            len(self._request.prompt_token_ids), self._num_cached, self._num_completion
        )

    def _cache_miss(self) -> CacheMiss | UnsetType:
        found = self._explanation
        if found is None:
            return UNSET
        if found.first_differing_token is None:
            return CacheMiss(found.reason)
        token_id = self._request.prompt_token_ids[found.first_differing_token]
        text = self._model.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return CacheMiss(found.reason, found.first_differing_token, text)

    async def whole(self) -> ChatCompletion:
        """The answers in one piece: the same deltas, folded."""
        answers = [AnswerMessage() for _ in range(self._request.num_choices)]
        async with aclosing(self.deltas()) as deltas:
            async for number, delta in deltas:
                answers[number].add(delta)
        return ChatCompletion(
            id=self.completion_id,
            created=self._created,
            model=self._model.name,
            choices=[self._whole_choice(*numbered) for numbered in enumerate(answers)],
            usage=self.usage(),
            timings=self._timings(),
            system_fingerprint=self._model.fingerprint,
        )

    async def chunks(self) -> AsyncGenerator[ChatCompletionChunk, None]:
        """The answers as they come: role, pieces, finish reason, usage if asked for."""
        begun = dict[int, MessageDeltas]()
        num_open = self._request.num_choices
        async with aclosing(self.deltas()) as deltas:
            async for number, delta in deltas:
                if number not in begun:
                    role = MessageDelta(role="assistant", content="")
                    yield self._chunk(ChunkChoice(delta=role, index=number))
                    begun[number] = MessageDeltas()
                num_open -= delta.finish_reason is not None
                for choice in self._chunk_choices(number, delta, begun[number]):
                    is_last = not num_open and choice.finish_reason is not None
                    yield self._chunk(choice, is_last and not self._request.include_usage)
        if self._request.include_usage:
            yield self._chunk(None, is_last=True)

    def _whole_choice(self, number: int, answer: AnswerMessage) -> Choice:
        return Choice(
            message=answer.message(),
            logprobs=self._choice_logprobs(answer.logprobs),
            finish_reason=answer.finish_reason,
            index=number,
        )

    def _chunk_choices(
        self, number: int, delta: AnswerDelta, messages: MessageDeltas
    ) -> Iterator[ChunkChoice]:
        """Log-probabilities go with the first piece."""
        entries = delta.logprobs
        for piece in delta.pieces:
            logprobs = self._choice_logprobs(entries)
            yield ChunkChoice(delta=messages.of(piece), logprobs=logprobs, index=number)
            entries = ()
        if delta.finish_reason is not None:
            logprobs = self._choice_logprobs(entries) if entries else None
            reason = delta.finish_reason
            yield ChunkChoice(delta=MessageDelta(), logprobs=logprobs, finish_reason=reason, index=number)

    def _chunk(self, choice: ChunkChoice | None, is_last: bool = False) -> ChatCompletionChunk:
        """A chunk of one choice, or the one after all, which has the usage instead."""
        has_usage = choice is None or self._request.continuous_usage
        return ChatCompletionChunk(
            id=self.completion_id,
            created=self._created,
            model=self._model.name,
            choices=[choice] if choice else [],
            system_fingerprint=self._model.fingerprint,
            usage=(self.usage() if has_usage else None) if self._request.include_usage else UNSET,
            timings=self._timings() if is_last else UNSET,
        )

    def _choice_logprobs(
        self, entries: list[LogprobEntry] | tuple[LogprobEntry, ...]
    ) -> ChoiceLogprobs | None:
        if self._request.sampling.num_logprobs is None:
            return None
        return ChoiceLogprobs(content=list(entries))
