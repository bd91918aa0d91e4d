"""One completion request: run its prompts on the engine, and shape what comes back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from nybble.engine.engine_client import EngineClient
from nybble.engine.messages import (
    AnswerEvent,
    PromptLogprobs,
    Request,
    RequestAccepted,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from nybble.server.access.prices import Prices
from nybble.server.requests.completion_request import CompletionJob
from nybble.server.requests.completion_schemas import CompletionChoice, TextCompletion
from nybble.server.requests.sampling_options import choice_sampling
from nybble.server.requests.schemas import (
    CompletionTokensDetails,
    PromptTokensDetails,
    Timings,
    Usage,
)
from nybble.server.served_model import ServedModel
from nybble.server.text.choices import run_all, run_choices
from nybble.server.text.completion_choices import ChoiceShaper, GrowingChoice
from nybble.server.text.request_timer import RequestTimer
from nybble.server.text.text_stream import Delta, TextStream


class TextCompletionRun:
    """Iterate `chunks`, or await `whole`; either runs it. Closing early aborts all that still runs.

    Answers are numbered prompt by prompt: those to the first prompt come first. accepted: set when the engine
    has taken all prompts.
    """

    def __init__(self, job: CompletionJob, engine: EngineClient, model: ServedModel, prices: Prices) -> None:
        self.completion_id = f"cmpl-{uuid.uuid4().hex}"
        self._job = job
        self._engine = engine
        self._model = model
        self._prices = prices
        self._created = int(time.time())
        self._timer = RequestTimer()
        self.accepted = asyncio.Event()
        self._num_accepted = 0  # prompts
        self._num_completion = 0
        self._num_cached = [0] * len(job.prompts)
        self._scores: list[list[TokenLogprobs]] = [[] for _ in job.prompts]  # from its second token on

    async def whole(self) -> TextCompletion:
        """The answers in one piece: the same choices, folded."""
        answers = [GrowingChoice(number) for number in range(len(self._job.prompts) * self._job.num_choices)]
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                answers[piece.index].add(piece)
        return self._answer([answer.choice() for answer in answers], self._usage(), self._timings())

    async def chunks(self) -> AsyncGenerator[TextCompletion, None]:
        """The answers as they come, a choice in each; usage in one of its own if asked for."""
        num_open = len(self._job.prompts) * self._job.num_choices
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                num_open -= piece.finish_reason is not None
                if piece.text or piece.finish_reason is not None:
                    is_last = not num_open and not self._job.include_usage
                    yield self._answer([piece], self._usage_so_far(), self._timings() if is_last else UNSET)
        if self._job.include_usage:
            yield self._answer([], self._usage(), self._timings())

    async def _pieces(self) -> AsyncGenerator[CompletionChoice, None]:
        num_choices = self._job.num_choices
        shapers = [
            ChoiceShaper(place * num_choices + number, prompt, self._scores[place], self._model.tokenizer)
            for place, prompt in enumerate(self._job.prompts)
            for number in range(num_choices)
        ]
        streams = [self._prompt(place) for place in range(len(self._job.prompts))]
        async with aclosing(run_all(streams)) as merged:
            async for place, (number, delta) in merged:
                shaper = shapers[place * num_choices + number]
                if shaper.must_prepare:
                    await asyncio.to_thread(shaper.prepare)
                yield shaper.choice(delta)

    def _prompt(self, place: int) -> AsyncGenerator[tuple[int, Delta], None]:
        """The pieces of one prompt's answers, each with the number of its choice."""
        return run_choices(lambda number: self._choice(place, number), self._job.num_choices)

    async def _choice(self, place: int, number: int) -> AsyncGenerator[Delta, None]:
        job, prompt = self._job, self._job.prompts[place]
        text_stream = TextStream(
            self._model.tokenizer, job.stop_strings, prompt.sampling.min_tokens, lists_special=True
        )
        request = Request(
            request_id=f"{self.completion_id}-{place}-{number}",
            prompt_token_ids=prompt.token_ids,
            sampling=self._sampling(place, number),
            priority=job.priority,
            deadline=self._timer.time_left(job.timeout),
            cache_salt=job.cache_salt,
        )
        async with aclosing(self._engine.generate(request)) as groups:
            is_first = number == 0  # the others find what it has computed
            async for events in groups:
                tokens = [event for event in events if isinstance(event, TokenEvent)]
                if len(tokens) < len(events):
                    self._note_progress(events, place, is_first)
                if not tokens:
                    continue
                self._timer.note_token(tokens[0], ends_prompt=is_first)
                if number == 0:
                    self._num_cached[place] = tokens[0].num_cached_tokens
                    is_first = False
                if not prompt.sampling.max_tokens:
                    yield Delta("", (), "length")
                    return
                delta = text_stream.feed_all(tokens)
                self._num_completion += delta.num_tokens
                yield delta
                if delta.finish_reason is not None:
                    return

    def _sampling(self, place: int, number: int) -> SamplingParams:
        """That of one of a prompt's answers, the first of which finds the prompt's log-probabilities."""
        sampling = self._job.prompts[place].sampling
        if number:
            sampling = replace(sampling, num_prompt_logprobs=None)
        return choice_sampling(sampling, place * self._job.num_choices + number)

    def _note_progress(self, events: Sequence[AnswerEvent], place: int, is_prompt: bool) -> None:
        for event in events:
            if isinstance(event, PromptLogprobs):
                self._scores[place] += event.logprobs
            elif isinstance(event, RequestAccepted):
                self._num_accepted += is_prompt
        if self._num_accepted == len(self._job.prompts):
            self.accepted.set()

    def _usage_so_far(self) -> Usage | UnsetType | None:
        """What a chunk says of it before the last one."""
        if not self._job.include_usage:
            return UNSET
        return self._usage() if self._job.continuous_usage else None

    def _timings(self) -> Timings:
        usage = self._usage()
        num_cached = usage.prompt_tokens_details.cached_tokens
        return self._timer.timings(usage.prompt_tokens, num_cached, usage.completion_tokens)

    def _usage(self) -> Usage:
        """Of all answers together; a prompt counts once."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self._job.prompts)
        num_cached = sum(self._num_cached)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_completion,
            total_tokens=num_prompt + self._num_completion,
            prompt_tokens_details=PromptTokensDetails(num_cached),
            completion_tokens_details=CompletionTokensDetails(0),
            estimated_cost=self._prices.cost(num_prompt, num_cached, self._num_completion),
        )

    def _answer(
        self,
        choices: list[CompletionChoice],
        usage: Usage | UnsetType | None,
        timings: Timings | UnsetType,
    ) -> TextCompletion:
        model = self._model
        return TextCompletion(
            self.completion_id, self._created, model.name, choices, model.fingerprint, usage, timings
        )
