"""From the bytes of a completion request (`/v1/completions`) to something that can be run.

A prompt in text may hold special tokens, such as those for filling in the middle: here the client writes the
whole prompt itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from nybble.engine.messages import SamplingParams
from nybble.server.errors import BadRequestError
from nybble.server.requests.completion_schemas import (
    MAX_PROMPT_LOGPROBS,
    MAX_PROMPTS,
    CompletionRequest,
    Prompt,
)
from nybble.server.requests.grammar_request import asked_grammar, open_thought
from nybble.server.requests.refused_fields import REFUSED_IN_COMPLETIONS
from nybble.server.requests.request_body import check_supported, decode_body
from nybble.server.requests.sampling_fields import settle_sampling, stop_strings
from nybble.server.served_model import ServedModel

DEFAULT_MAX_TOKENS = 16  # OpenAI's

_decoder = msgspec.json.Decoder(CompletionRequest)


@dataclass(frozen=True)
class PromptToComplete:
    """One prompt of a request. `echo` is what its answers begin with."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    echo: str

    @property
    def has_scores(self) -> bool:
        """Whether the log-probabilities of its own tokens are wanted."""
        return self.sampling.num_prompt_logprobs is not None


@dataclass(frozen=True)
class CompletionJob:
    """A request as checked: what the engine runs, and how its text is cut and sent."""

    prompts: tuple[PromptToComplete, ...]
    num_choices: int  # for each prompt
    stop_strings: tuple[str, ...]
    cache_salt: str
    is_stream: bool
    include_usage: bool
    continuous_usage: bool  # in each chunk
    priority: int
    timeout: float | None  # seconds


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Decode and check types, ranges and support; BadRequestError names the field."""
    request = decode_body(body, _decoder)
    check_supported(request, REFUSED_IN_COMPLETIONS)
    if request.stream_options is not None and not request.stream:
        raise BadRequestError("stream_options: needs stream to be true", "stream_options")
    return request


def prepare_completion_request(request: CompletionRequest, model: ServedModel) -> CompletionJob:
    """Tokenize and settle every default.

    Raises:
        NotFoundError: another model is named.
        BadRequestError: there are too many prompts, or one is empty or does not fit in the context.
    """
    model.check_name(request.model)
    prompts = _prompts(request.prompt)
    num_choices = request.n or 1
    if len(prompts) * num_choices > MAX_PROMPTS:
        raise BadRequestError(
            f"prompt: {len(prompts)} prompts with n = {num_choices} are more than {MAX_PROMPTS} answers",
            "prompt",
        )
    prepared = tuple(_prepare(request, prompt, model) for prompt in prompts)
    _check_scores(prepared)
    return CompletionJob(
        prompts=prepared,
        num_choices=num_choices,
        stop_strings=stop_strings(request),
        cache_salt=request.cache_salt or "",
        is_stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        continuous_usage=bool(request.stream_options and request.stream_options.continuous_usage_stats),
        priority=request.priority or 0,
        timeout=request.timeout,
    )


def _check_scores(prompts: Sequence[PromptToComplete]) -> None:
    """Refuse more log-probabilities of prompts than a response should hold."""
    count = sum(
        len(prompt.token_ids) * (1 + prompt.sampling.num_prompt_logprobs)
        for prompt in prompts
        if prompt.sampling.num_prompt_logprobs is not None
    )
    if count > MAX_PROMPT_LOGPROBS:
        raise BadRequestError(
            f"logprobs: with echo these would be {count} numbers for the prompts, over {MAX_PROMPT_LOGPROBS}",
            "logprobs",
        )


def _prompts(prompt: Prompt) -> Sequence[str | list[int]]:
    """Each prompt of a request, as text or as token ids."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [[item for item in prompt if isinstance(item, int)]]
    if len(kinds) > 1:
        raise BadRequestError("prompt: a mixture of texts, token ids and lists of token ids", "prompt")
    return [item for item in prompt if not isinstance(item, int)]


def _prepare(request: CompletionRequest, prompt: str | list[int], model: ServedModel) -> PromptToComplete:
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        has_added = request.add_special_tokens is not False
        token_ids = tokenizer.encode(prompt, add_special_tokens=has_added)
    else:
        token_ids = model.check_token_ids(prompt, "prompt")
    if not token_ids:
        raise BadRequestError("prompt: empty; a prompt needs a token at least", "prompt")
    room = max(1, model.max_model_len - len(token_ids))
    sampling = settle_sampling(
        request,
        model,
        len(token_ids),
        max_tokens=min(DEFAULT_MAX_TOKENS, room) if request.max_tokens is None else request.max_tokens,
        num_logprobs=request.logprobs,
        prompt_field="prompt",
        length_field="max_tokens",
        grammar=asked_grammar(request, open_thought(tokenizer, token_ids)),
    )
    text = prompt if isinstance(prompt, str) else tokenizer.decode(token_ids)
    if not request.echo:
        return PromptToComplete(token_ids, sampling, "")
    if request.logprobs is not None:
        sampling = msgspec.structs.replace(sampling, num_prompt_logprobs=request.logprobs)
        text = tokenizer.decode(token_ids)  # special tokens that were added included, as in the lists
    return PromptToComplete(token_ids, sampling, text)
