"""From the bytes of a chat completion request to something that can be run, or an error that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from nybble.engine.grammar.grammar import Grammar
from nybble.engine.messages import SamplingParams
from nybble.engine.tokenizer import ChatPrompt, ChatTemplateError, ContinuationError, Tokenizer
from nybble.server.chat.chat_messages import template_messages
from nybble.server.chat.replay_store import ReplayStore
from nybble.server.chat.thinking import ends_in_thought, has_thinking, template_options, thinking_budget
from nybble.server.chat.tools import Tools, check_tools, offered_tools
from nybble.server.errors import BadRequestError, UnprocessableError
from nybble.server.grammars.call_grammar import call_grammar
from nybble.server.requests.grammar_request import asked_grammar, coming_thought
from nybble.server.requests.refused_fields import REFUSED_IN_CHATS
from nybble.server.requests.request_body import check_supported, decode_body
from nybble.server.requests.sampling_fields import settle_sampling, stop_strings
from nybble.server.requests.schemas import ChatCompletionRequest, ChatMessage
from nybble.server.served_model import ServedModel

_decoder = msgspec.json.Decoder(ChatCompletionRequest)


@dataclass(frozen=True)
class ChatRequest:
    """A request as checked: what the engine runs, and how its text is cut and sent."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int
    stop_strings: tuple[str, ...]
    cache_salt: str
    explain_cache: bool
    is_stream: bool
    include_usage: bool
    continuous_usage: bool = False  # in each chunk
    priority: int = 0
    timeout: float | None = None  # seconds
    has_thinking: bool = False  # whether the model has tags for thoughts
    is_thinking: bool = False  # whether the prompt ends within one
    tools: Tools | None = None  # that the answer may call


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """Decode and check types, ranges and support; BadRequestError names the field."""
    request = decode_body(body, _decoder)
    check_supported(request, REFUSED_IN_CHATS)
    check_chat(request)
    _check_combinations(request)
    return request


def prepare_chat_request(
    request: ChatCompletionRequest, model: ServedModel, replay: ReplayStore | None = None
) -> ChatRequest:
    """Render, tokenize and settle every default. Turns that `replay` knows keep their tokens.

    Raises:
        NotFoundError: another model is named.
        UnprocessableError: the chat template refuses the messages.
        BadRequestError: prompt and answer do not fit in the context.
    """
    model.check_name(request.model)
    tools = offered_tools(request, model.tokenizer)
    prompt = chat_prompt(request, model, tools)
    cache_salt = request.cache_salt or ""
    prompt_token_ids = prompt.token_ids
    if replay is not None:
        prompt_token_ids = replay.replayed(cache_salt, prompt_token_ids)
    return ChatRequest(
        prompt_token_ids=prompt_token_ids,
        sampling=msgspec.structs.replace(
            _sampling(request, model, prompt_token_ids, tools),
            thinking_budget=thinking_budget(request, model.tokenizer, prompt.text),
        ),
        num_choices=request.n or 1,
        stop_strings=stop_strings(request),
        cache_salt=cache_salt,
        explain_cache=bool(request.explain_cache),
        is_stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        continuous_usage=bool(request.stream_options and request.stream_options.continuous_usage_stats),
        priority=request.priority or 0,
        timeout=request.timeout,
        has_thinking=has_thinking(model.tokenizer),
        is_thinking=ends_in_thought(prompt.text),
        tools=tools,
    )


def chat_prompt(request: ChatCompletionRequest, model: ServedModel, tools: Tools | None) -> ChatPrompt:
    """The prompt by the chat template. Raises UnprocessableError: it refuses the messages."""
    continues = bool(request.continue_final_message)
    try:
        return model.tokenizer.encode_chat(
            template_messages(request.messages, model.tokenizer.takes_argument_text),
            tools.definitions if tools else (),
            template_options(request),
            add_generation_prompt=not continues and request.add_generation_prompt is not False,
            continue_final_message=continues,
        )
    except ContinuationError as error:
        raise UnprocessableError(str(error), "continue_final_message") from error
    except ChatTemplateError as error:
        raise UnprocessableError(str(error), "messages") from error


def check_chat(request: ChatCompletionRequest) -> None:
    """Refuse messages and tools that no prompt can be made of; BadRequestError names the field."""
    _check_messages(request.messages)
    check_tools(request)
    if request.continue_final_message:
        _check_continuation(request)


def _check_continuation(request: ChatCompletionRequest) -> None:
    name, last = "continue_final_message", request.messages[-1]
    if request.add_generation_prompt:
        raise BadRequestError(f"{name}: not together with add_generation_prompt", name)
    if last.role != "assistant" or last.tool_calls:
        raise BadRequestError(f"{name}: the last message must be an assistant's without tool calls", name)


def _check_messages(messages: Sequence[ChatMessage]) -> None:
    """Refuse what messages may hold and is not supported."""
    for index, message in enumerate(messages):
        for field in ("audio", "function_call"):
            if getattr(message, field):
                name = f"messages[{index}].{field}"
                raise BadRequestError(f"{name}: not supported by this server", name, "unsupported_parameter")


def _check_combinations(request: ChatCompletionRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise BadRequestError("stream_options: needs stream to be true", "stream_options")
    is_usage_sent = request.stream_options is not None and request.stream_options.include_usage
    if request.explain_cache and request.stream and not is_usage_sent:
        raise BadRequestError(
            "explain_cache: in a stream it needs stream_options.include_usage to be true", "explain_cache"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequestError("top_logprobs: needs logprobs to be true", "top_logprobs")


def _sampling(
    request: ChatCompletionRequest, model: ServedModel, prompt_token_ids: tuple[int, ...], tools: Tools | None
) -> SamplingParams:
    return settle_sampling(
        request,
        model,
        len(prompt_token_ids),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_field="messages",
        length_field="max_completion_tokens" if request.max_completion_tokens else "max_tokens",
        grammar=_grammar(request, model.tokenizer, prompt_token_ids, tools),
    )


def _grammar(
    request: ChatCompletionRequest,
    tokenizer: Tokenizer,
    prompt_token_ids: tuple[int, ...],
    tools: Tools | None,
) -> Grammar | None:
    """The form that the answer must have, with its calls."""
    thought = coming_thought(tokenizer, prompt_token_ids)
    if tools is None:
        return asked_grammar(request, thought)
    grammar = call_grammar(tools, tokenizer, thought, content=asked_grammar(request, None))
    if grammar is not None and request.ignore_eos:
        raise BadRequestError(f"ignore_eos: not together with {grammar.parameter}", "ignore_eos")
    return grammar
