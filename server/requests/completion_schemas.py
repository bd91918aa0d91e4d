"""JSON of completions, tokenize and detokenize, as types. Field names are the wire's: OpenAI's and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from nybble.server.requests.refused_fields import RefusedFields
from nybble.server.requests.sampling_fields import TokenId
from nybble.server.requests.schemas import (
    MAX_TOP_LOGPROBS,
    CacheSalt,
    ChatMessage,
    Priority,
    Seconds,
    StreamOptions,
    TemplateOptions,
    Timings,
    ToolDefinitions,
    Usage,
)

MAX_PROMPTS = 64
MAX_PROMPT_LOGPROBS = 1 << 18  # of a request: for each token of its prompts one, and one for each alternative

# A text, texts, token ids, or lists of token ids: msgspec knows one list in a union, so that a mixture is
# found later.
Prompt = str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]


class CompletionRequest(RefusedFields, frozen=True, kw_only=True):
    model: str
    prompt: Prompt
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None
    priority: Priority | None = None
    timeout: Seconds | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: CacheSalt | None = None
    # Refused.
    best_of: int | None = None
    suffix: str | None = None
    truncate_prompt_tokens: int | None = None


class CompletionLogprobs(Struct, frozen=True):
    """One entry a token in each list, special ones too; text_offset: where its text begins, in characters of
    `text`. The first token of a prompt that is echoed has no log-probabilities. top_logprobs has the
    likeliest tokens and the one that came; of two with the same text, the likelier."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Struct, frozen=True):
    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class TextCompletion(Struct, frozen=True):
    """A whole answer, or a chunk of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    object: Literal["text_completion"] = "text_completion"


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """A prompt, or the messages of a chat; model may be left out."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    tools: ToolDefinitions | None = None
    # Refused.
    chat_template: Any = None


class TokenizeAnswer(Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


class DetokenizeAnswer(Struct, frozen=True):
    prompt: str
