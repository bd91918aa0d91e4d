"""The OpenAI chat API's JSON, as types. Field names are the wire's.

A field of OpenAI's that would change the answer and that we do not honour is listed here too, so that using
it is an error that names it (`refused_fields.py`); any other field is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from nybble.server.requests.refused_fields import RefusedFields
from nybble.server.requests.sampling_fields import PositiveInt

MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 512

Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Seconds = Annotated[float, Meta(gt=0)]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=256)]
ToolDefinitions = Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)]  # each a Tool
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TextPart(Struct, frozen=True):
    """A part of a message's content. `type` other than text is refused by name."""

    type: str
    text: str | None = None


class PastFunctionCall(Struct, frozen=True):
    """arguments: a JSON object, or its text."""

    name: Annotated[str, Meta(min_length=1)]
    arguments: str | dict[str, Any] = ""


class PastToolCall(Struct, frozen=True):
    function: PastFunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None  # the thought before an assistant's answer, by either name
    reasoning: str | None = None
    tool_calls: list[PastToolCall] | None = None
    tool_call_id: str | None = None
    # Refused when set.
    audio: Any = None
    function_call: Any = None


class StreamOptions(Struct, frozen=True):
    """continuous_usage_stats: with include_usage, every chunk has the usage so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class FunctionDefinition(Struct, frozen=True):
    """parameters: a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Struct, frozen=True):
    name: str


class NamedTool(Struct, frozen=True, tag_field="type", tag="function"):
    function: FunctionName


class AllowedToolList(Struct, frozen=True):
    """mode: as tool_choice, for these tools only."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Struct, frozen=True, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedToolList


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class TemplateOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Variables of the chat template that a client may set: they change the prompt, so others are refused."""

    enable_thinking: bool | None = None
    clear_thinking: bool | None = None


class ThinkingOptions(Struct, frozen=True):
    """Z.ai's way to say the same."""

    type: Literal["enabled", "disabled"] | None = None
    clear_thinking: bool | None = None


class ReasoningOptions(Struct, frozen=True):
    """DeepInfra's and OpenRouter's way."""

    enabled: bool | None = None
    effort: ReasoningEffort | None = None


class ChatCompletionRequest(RefusedFields, frozen=True, kw_only=True):
    model: str
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: PositiveInt | None = None
    priority: Priority | None = None
    timeout: Seconds | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: CacheSalt | None = None
    explain_cache: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning: ReasoningOptions | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking: ThinkingOptions | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0)] | None = None
    tools: ToolDefinitions | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Refused.
    audio: Any = None
    echo: bool | None = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    prediction: Any = None
    store: bool | None = None
    verbosity: Any = None
    web_search_options: Any = None


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class LogprobEntry(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Struct, frozen=True):
    content: list[LogprobEntry]
    refusal: None = None


class CacheMiss(Struct, frozen=True, omit_defaults=True):
    """Why no more of the prompt was cached: see the engine's `CacheExplanation`. text: that of the first
    token that differs, as this prompt has it."""

    reason: str
    first_differing_token: int | UnsetType = UNSET
    text: str | UnsetType = UNSET


class PromptTokensDetails(Struct, frozen=True, omit_defaults=True):
    cached_tokens: int
    cache_miss: CacheMiss | UnsetType = UNSET


class CompletionTokensDetails(Struct, frozen=True):
    reasoning_tokens: int


class Usage(Struct, frozen=True):
    """estimated_cost: US dollars."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    estimated_cost: float


class Timings(Struct, frozen=True):
    """llama.cpp's names: n for tokens, ms for milliseconds.

    prompt: from the request to its first token, without the time in the queue; its tokens that were not
    cached. predicted: from the first token to the last; its rates are of the tokens after the
    first, which comes with the prompt. A rate without any time or tokens is 0.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    queue_ms: float


class FunctionCall(Struct, frozen=True):
    name: str
    arguments: str  # JSON


class ToolCall(Struct, frozen=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class AssistantMessage(Struct, frozen=True):
    content: str | None
    reasoning_content: str | UnsetType = UNSET  # the same by both names
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Choice(Struct, frozen=True):
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str
    index: int = 0


class ChatCompletion(Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    timings: Timings
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"


class FunctionCallDelta(Struct, frozen=True, omit_defaults=True):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct, frozen=True, omit_defaults=True):
    """The first of a call has its id, type and name; arguments of all are to be joined."""

    index: int
    function: FunctionCallDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class MessageDelta(Struct, frozen=True, omit_defaults=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET  # the same by both names
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    delta: MessageDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None
    index: int = 0


class ChatCompletionChunk(Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Model(Struct, frozen=True):
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "nybble"


class ModelList(Struct, frozen=True):
    data: list[Model]
    object: Literal["list"] = "list"


class Version(Struct, frozen=True):
    version: str


class Status(Struct, frozen=True):
    status: Literal["ok"] = "ok"


class ErrorObject(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Struct, frozen=True):
    error: ErrorObject
