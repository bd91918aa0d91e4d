"""Offline use from Python: load a checkpoint and generate, without a server.

from nybble.engine.engine_config import EngineConfig
from nybble.server.llm import LLM
from nybble.server.requests.sampling_options import SamplingOptions

llm = LLM(EngineConfig(checkpoint="build/demo-checkpoint"))
answers = llm.chat([[{"role": "user", "content": "What is the capital of France?"}]])
print(answers[0].text)
texts = llm.generate(["Once upon a time", "1, 2, 3,"], SamplingOptions(max_tokens=20), stop=["."])
"""

from __future__ import annotations

import os

from nybble.engine.ranks.tuning import TUNING

os.environ.update(TUNING | os.environ)  # before torch is imported

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nybble.engine.engine import Engine
from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import InvalidRequestError, RequestFailedError
from nybble.engine.loading import load_engine, prepare
from nybble.engine.messages import Request, RequestFailed, TokenEvent
from nybble.engine.tokenizer import Tokenizer
from nybble.server.chat.answer_message import AnswerMessage
from nybble.server.chat.answer_parser import AnswerParser
from nybble.server.chat.answer_stream import AnswerFinish, AnswerStream
from nybble.server.chat.thinking import ends_in_thought, has_thinking
from nybble.server.requests.sampling_fields import MAX_CHOICES
from nybble.server.requests.sampling_options import SamplingOptions, choice_sampling
from nybble.server.requests.schemas import LogprobEntry
from nybble.server.served_model import ServedModel, describe_model
from nybble.server.text.text_stream import TextStream


@dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """`token_ids` are all that were generated, stop tokens and what a stop string cut off included.
    `reasoning` is the thought before a chat's answer, without its tags."""

    text: str
    reasoning: str = ""
    token_ids: tuple[int, ...]
    logprobs: tuple[LogprobEntry, ...]
    finish_reason: AnswerFinish
    num_prompt_tokens: int
    num_cached_tokens: int


class LLM:
    """A model in this process. Not thread-safe; prompts given together run together."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the checkpoint. Any number of prompts may wait: `max_waiting` is for servers.

        Raises:
            CheckpointError, OptionError: as for `prepare`.
        """
        preparation = prepare(replace(config, scheduler=replace(config.scheduler, max_waiting=None)))
        tokenizer = Tokenizer(Path(config.checkpoint))
        self._model: ServedModel = describe_model(None, tokenizer, preparation.ready_message())
        self._engine: Engine = load_engine(preparation)

    def generate(
        self,
        prompts: str | Iterable[str | Sequence[int]],
        options: SamplingOptions | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[GeneratedText]:
        """Continue each prompt, a text or token ids; `options.n` results for each, in their order.

        Raises:
            InvalidRequestError: a prompt cannot be run; then none is.
            RequestFailedError: the engine failed; all prompts are given up.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        encode = self._model.tokenizer.encode
        token_ids = [encode(prompt) if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]
        return self._run([_Prompt(ids) for ids in token_ids], options, stop)

    def chat(
        self,
        conversations: Iterable[Sequence[Mapping[str, str]]],
        options: SamplingOptions | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[GeneratedText]:
        """Answer each conversation, a list of {"role", "content"} messages, by the chat template.

        A thought before the answer is not in the result's `text` but in its `reasoning`.

        Raises:
            ChatTemplateError: the template refuses the messages.
            InvalidRequestError: a prompt cannot be run; then none is.
        """
        return self._run([self._chat_prompt(messages) for messages in conversations], options, stop)

    def _chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> _Prompt:
        tokenizer = self._model.tokenizer
        prompt = tokenizer.encode_chat(messages)
        return _Prompt(prompt.token_ids, has_thinking(tokenizer), ends_in_thought(prompt.text))

    def _run(
        self, prompts: Sequence[_Prompt], options: SamplingOptions | None, stop: str | Sequence[str]
    ) -> list[GeneratedText]:
        options = options or SamplingOptions()
        stop_strings = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop_strings:
            raise InvalidRequestError("a stop string is empty", "stop")
        answers = [
            answer
            for index, prompt in enumerate(prompts)
            for answer in self._answers(str(index), prompt, options, stop_strings)
        ]
        by_id = {answer.request.request_id: answer for answer in answers}
        try:
            for answer in answers[:: options.n]:
                self._engine.add(answer.request)
            while self._engine.has_work:
                for event in self._engine.step():
                    if isinstance(event, RequestFailed):
                        raise RequestFailedError(event.message)
                    if isinstance(event, TokenEvent):
                        self._take(event, by_id[event.request_id])
        except BaseException:  # a bad prompt or Ctrl-C must not leave the others running
            for request_id in by_id:
                self._engine.abort(request_id)
            raise
        return [answer.result() for answer in answers]

    def _answers(
        self, request_id: str, prompt: _Prompt, options: SamplingOptions, stop: Sequence[str]
    ) -> list[_Answer]:
        """Those to one prompt, of which the first leads the others."""
        if not 1 <= options.n <= MAX_CHOICES:
            raise InvalidRequestError(f"n is {options.n!r}, expected 1 to {MAX_CHOICES}", "n")
        if options.max_tokens == 0:
            raise InvalidRequestError("max_tokens is 0, expected 1 or more", "max_tokens")
        sampling = options.resolve(self._model, len(prompt.token_ids))
        first, *others = (
            Request(
                request_id=f"{request_id}-{number}",
                prompt_token_ids=prompt.token_ids,
                sampling=choice_sampling(sampling, number),
            )
            for number in range(options.n)
        )

        def answer(request: Request, followers: list[Request]) -> _Answer:
            text_stream = TextStream(self._model.tokenizer, stop, options.min_tokens)
            parser = AnswerParser(prompt.has_thinking, prompt.is_thinking)
            return _Answer(request, AnswerStream(text_stream, parser), followers)

        return [answer(first, others), *(answer(other, []) for other in others)]

    def _take(self, event: TokenEvent, answer: _Answer) -> None:
        if answer.finish_reason is not None:
            return  # a stop string ended it among the tokens of this step
        answer.take(event)
        if answer.finish_reason is not None and event.finish_reason is None:
            self._engine.abort(event.request_id)
        while answer.followers:
            self._engine.add(answer.followers.pop(0))


@dataclass(frozen=True)
class _Prompt:
    """has_thinking: whether a thought may come before its answer; is_thinking: whether it ends within one."""

    token_ids: tuple[int, ...]
    has_thinking: bool = False
    is_thinking: bool = False


@dataclass
class _Answer:
    """A request's answer as it grows. `followers` are started with its first token: they find the prompt,
    which is then computed, in the prefix cache."""

    request: Request
    stream: AnswerStream
    followers: list[Request]
    message: AnswerMessage = field(default_factory=AnswerMessage)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: AnswerFinish | None = None
    num_cached_tokens: int = 0

    def take(self, event: TokenEvent) -> None:
        delta = self.stream.feed([event])
        self.message.add(delta)
        self.token_ids.append(event.token_id)
        self.finish_reason = delta.finish_reason
        self.num_cached_tokens = event.num_cached_tokens

    def result(self) -> GeneratedText:
        if self.finish_reason is None:
            raise RuntimeError("the engine has no work left, but this answer is unfinished")
        return GeneratedText(
            text=self.message.content,
            reasoning=self.message.reasoning,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.message.logprobs),
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
        )
