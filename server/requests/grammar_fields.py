"""Fields about the form of an answer: OpenAI's and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from nybble.server.requests.sampling_fields import SamplingFields

MAX_ANSWERS = 4096

GrammarText = Annotated[str, Meta(min_length=1)]
Answers = Annotated[list[str], Meta(min_length=1, max_length=MAX_ANSWERS)]


class JSONSchemaFormat(Struct, frozen=True):
    """strict None or False: what cannot be checked of the schema is ignored."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None


class StructuredOutputs(Struct, frozen=True):
    """vLLM's: one of them. `grammar` is Lark or GBNF; a text as `json` holds the schema."""

    json: dict[str, Any] | str | None = None
    regex: GrammarText | None = None
    choice: Answers | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None


class FormFields(SamplingFields, frozen=True, kw_only=True):
    """Of chat completions and completions."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Answers | None = None
    guided_grammar: GrammarText | None = None
