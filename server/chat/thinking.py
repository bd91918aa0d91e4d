"""What a request says about thinking, and what its prompt shows of it."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.engine.sampling.thinking_limit import ThinkingBudget
from nybble.engine.tokenizer import Tokenizer
from nybble.server.chat.answer_parser import END_THINK, THINK
from nybble.server.chat.tool_call_parser import CALL
from nybble.server.errors import BadRequestError
from nybble.server.requests.schemas import (
    ChatCompletionRequest,
    ChatMessage,
    ReasoningOptions,
    TemplateOptions,
    ThinkingOptions,
)

Statement = tuple[str, bool | None]  # a field, and what it says if anything


def template_options(request: ChatCompletionRequest) -> dict[str, bool]:
    """Variables for the chat template, which knows the defaults of those that are not said.

    GLM thinks or does not: every effort but none is thinking.

    Raises:
        BadRequestError: two fields contradict each other.
    """
    template = request.chat_template_kwargs or TemplateOptions()
    thinking = request.thinking or ThinkingOptions()
    reasoning = request.reasoning or ReasoningOptions()
    settled = {
        "enable_thinking": _settled(
            ("chat_template_kwargs.enable_thinking", template.enable_thinking),
            ("thinking.type", _is(thinking.type, "enabled")),
            ("reasoning.enabled", reasoning.enabled),
            ("reasoning.effort", _is_not(reasoning.effort, "none")),
            ("reasoning_effort", _is_not(request.reasoning_effort, "none")),
        ),
        "clear_thinking": _settled(
            ("chat_template_kwargs.clear_thinking", template.clear_thinking),
            ("thinking.clear_thinking", thinking.clear_thinking),
        ),
    }
    return {name: value for name, value in settled.items() if value is not None}


def past_thought(index: int, message: ChatMessage) -> str | None:
    """The thought of an assistant's message. Raises BadRequestError if it has two different ones."""
    first, second = message.reasoning_content, message.reasoning
    if first is not None and second is not None and first != second:
        param = f"messages[{index}].reasoning"
        raise BadRequestError(f"{param}: differs from reasoning_content", param)
    return second if first is None else first


def has_thinking(tokenizer: Tokenizer) -> bool:
    """Whether the model has tags for its thoughts."""
    return tokenizer.has_token(THINK) and tokenizer.has_token(END_THINK)


def thinking_budget(
    request: ChatCompletionRequest, tokenizer: Tokenizer, prompt: str
) -> ThinkingBudget | None:
    """How many tokens the thought after a prompt may have. A call of a tool ends it, too.

    Raises:
        BadRequestError: the model has no tags for thoughts.
    """
    name = "thinking_token_budget"
    if request.thinking_token_budget is None:
        return None
    if not has_thinking(tokenizer):
        raise BadRequestError(f"{name}: not supported by this model", name, "unsupported_parameter")
    if prompt.rstrip().endswith(END_THINK):
        return None
    ends = (END_THINK, CALL) if request.tools and tokenizer.has_token(CALL) else (END_THINK,)
    return ThinkingBudget(
        num_tokens=request.thinking_token_budget,
        end_token_ids=tuple(tokenizer.encode(tag)[0] for tag in ends),
        start_token_id=None if ends_in_thought(prompt) else tokenizer.encode(THINK)[0],
    )


def ends_in_thought(prompt: str) -> bool:
    """GLM-4.7's template opens the thought; with older ones, the model does."""
    return prompt.rstrip().endswith(THINK)


def _settled(*statements: Statement) -> bool | None:
    said: Sequence[Statement] = [statement for statement in statements if statement[1] is not None]
    for name, value in said[1:]:
        if value != said[0][1]:
            raise BadRequestError(f"{name}: contradicts {said[0][0]}", name)
    return said[0][1] if said else None


def _is(value: str | None, wanted: str) -> bool | None:
    return None if value is None else value == wanted


def _is_not(value: str | None, wanted: str) -> bool | None:
    return None if value is None else value != wanted
