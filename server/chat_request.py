"""From the bytes of a chat completion request to something that can be run, or an error that says why not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from nybble.engine.errors import ContextLengthError
from nybble.engine.messages import SamplingParams
from nybble.engine.tokenizer import ChatTemplateError
from nybble.server.errors import BadRequestError, NotFoundError, UnprocessableError
from nybble.server.replay_store import ReplayStore
from nybble.server.sampling_options import SamplingOptions
from nybble.server.schemas import ChatCompletionRequest, ChatMessage, TextPart
from nybble.server.served_model import ServedModel
from nybble.server.thinking import ends_in_thought, has_thinking, past_thought, template_options

_decoder = msgspec.json.Decoder(ChatCompletionRequest)
# msgspec ends its messages with " - at `$.messages[0].content`" or " - at `key` in `$.logit_bias`".
_LOCATION = re.compile(r"^(?P<message>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)

# Fields that are refused unless they hold a value that changes nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}


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
    priority: int = 0
    timeout: float | None = None  # seconds
    has_thinking: bool = False  # whether the model has tags for thoughts
    is_thinking: bool = False  # whether the prompt ends within one


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """Decode and check types, ranges and support; BadRequestError names the field."""
    try:
        request = _decoder.decode(body)
    except msgspec.ValidationError as error:
        message, param = _split_location(str(error))
        raise BadRequestError(f"{param or 'request body'}: {message}", param) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the request body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise BadRequestError("the request body is nested too deeply", code="invalid_json") from error
    _check_supported(request)
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
    if request.model != model.name:
        raise NotFoundError(
            f"the model {request.model!r} is not served here; this is {model.name!r}",
            "model",
            "model_not_found",
        )
    messages = [_plain_message(index, m) for index, m in enumerate(request.messages)]
    try:
        prompt = model.tokenizer.render_chat(messages, options=template_options(request))
    except ChatTemplateError as error:
        raise UnprocessableError(str(error), "messages") from error
    cache_salt = request.cache_salt or ""
    prompt_token_ids = model.tokenizer.encode(prompt)
    if replay is not None:
        prompt_token_ids = replay.replayed(cache_salt, prompt_token_ids)
    return ChatRequest(
        prompt_token_ids=prompt_token_ids,
        sampling=_sampling(request, model, len(prompt_token_ids)),
        num_choices=request.n or 1,
        stop_strings=_stop_strings(request.stop),
        cache_salt=cache_salt,
        explain_cache=bool(request.explain_cache),
        is_stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        priority=request.priority or 0,
        timeout=request.timeout,
        has_thinking=has_thinking(model.tokenizer),
        is_thinking=ends_in_thought(prompt),
    )


def _split_location(text: str) -> tuple[str, str | None]:
    match = _LOCATION.match(text)
    if match is None:
        return text, None
    message, path = match["message"], (match["path"] or "").removesuffix("[...]")
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
    return message, path or None


def _check_supported(request: ChatCompletionRequest) -> None:
    for name, harmless in _UNSUPPORTED.items():
        value = getattr(request, name)
        if value is not None and value not in harmless:
            raise BadRequestError(
                f"{name}: not supported by this server{_shown(value)}", name, "unsupported_parameter"
            )
    for index, message in enumerate(request.messages):
        for field in ("audio", "function_call", "tool_calls"):
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


def _shown(value: Any) -> str:
    """The value if it is short; an object or array may be anything."""
    is_short = isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 40)
    return f" with value {value!r}" if is_short else ""


def _plain_message(index: int, message: ChatMessage) -> dict[str, str]:
    """Role and text as the template expects them: no parts, no null, developer as system."""
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if content is None:
        if role != "assistant":
            param = f"messages[{index}].content"
            raise BadRequestError(f"{param}: missing for role {message.role!r}", param)
        content = ""
    if not isinstance(content, str):
        content = "".join(_part_text(index, n, part) for n, part in enumerate(content))
    thought = past_thought(index, message) if role == "assistant" else None
    return {"role": role, "content": content} | ({} if thought is None else {"reasoning_content": thought})


def _part_text(index: int, number: int, part: TextPart) -> str:
    param = f"messages[{index}].content[{number}]"
    if part.type != "text":
        raise BadRequestError(f"{param}: type {part.type!r} is not supported, only 'text'", param)
    if part.text is None:
        raise BadRequestError(f"{param}.text: missing", f"{param}.text")
    return part.text


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _sampling(request: ChatCompletionRequest, model: ServedModel, num_prompt_tokens: int) -> SamplingParams:
    options = SamplingOptions(
        max_tokens=request.max_completion_tokens or request.max_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p or 0.0,
        min_tokens=request.min_tokens or 0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias or {},
        allowed_token_ids=request.allowed_token_ids,
        bad_words=request.bad_words or (),
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=request.stop_token_ids or (),
        seed=request.seed,
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    try:
        return options.resolve(model, num_prompt_tokens)
    except ContextLengthError as error:
        answer_length = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        param = "messages" if error.parameter == "prompt" else answer_length
        raise BadRequestError(f"{param}: {error}", param, "context_length_exceeded") from error
