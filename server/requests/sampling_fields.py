"""Fields about sampling that chat completions and completions share: the wire's names, and their meaning."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from nybble.engine.errors import ContextLengthError
from nybble.engine.grammar.grammar import Grammar
from nybble.engine.messages import SamplingParams
from nybble.server.errors import BadRequestError
from nybble.server.requests.sampling_options import SamplingOptions
from nybble.server.served_model import ServedModel

MAX_STOP_STRINGS = 16
MAX_CHOICES = 8
MAX_BAD_WORDS = 256
MAX_BIASES = 1024
MAX_STOP_TOKENS = 512

PositiveInt = Annotated[int, Meta(ge=1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
StopString = Annotated[str, Meta(min_length=1, max_length=1000)]


class SamplingFields(Struct, frozen=True, kw_only=True):
    """Null is the same as absent."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_tokens: PositiveInt | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=5)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MAX_BIASES)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=MAX_BAD_WORDS)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    seed: int | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None


def stop_strings(fields: SamplingFields) -> tuple[str, ...]:
    return (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())


def settle_sampling(
    fields: SamplingFields,
    model: ServedModel,
    num_prompt_tokens: int,
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    prompt_field: str,
    length_field: str,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Settle every default. max_tokens None: all the room that the prompt leaves.

    Raises:
        BadRequestError: prompt and answer do not fit in the context; it names the field at fault.
    """
    options = SamplingOptions(
        max_tokens=max_tokens,
        temperature=fields.temperature,
        top_k=fields.top_k,
        top_p=fields.top_p,
        min_p=fields.min_p or 0.0,
        min_tokens=fields.min_tokens or 0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=fields.logit_bias or {},
        allowed_token_ids=fields.allowed_token_ids,
        bad_words=fields.bad_words or (),
        ignore_eos=bool(fields.ignore_eos),
        stop_token_ids=fields.stop_token_ids or (),
        seed=fields.seed,
        num_logprobs=num_logprobs,
        grammar=grammar,
    )
    try:
        return options.resolve(model, num_prompt_tokens)
    except ContextLengthError as error:
        param = prompt_field if error.parameter == "prompt" else length_field
        raise BadRequestError(f"{param}: {error}", param, "context_length_exceeded") from error
