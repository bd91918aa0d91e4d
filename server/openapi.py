"""The API's description (OpenAPI 3.1), made from the same types that requests are decoded with."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import msgspec

from nybble.server.requests.completion_schemas import (
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    TextCompletion,
    TokenizeAnswer,
    TokenizeRequest,
)
from nybble.server.requests.schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ErrorAnswer,
    Model,
    ModelList,
    Status,
    Version,
)

ERROR_STATUSES = ("400", "401", "403", "404", "405", "408", "413", "415", "422", "429", "500", "503", "504")


@dataclass(frozen=True)
class Operation:
    """`chunk`: what each event of a streamed answer holds."""

    method: str
    path: str
    summary: str
    answer: type
    request: type | None = None
    chunk: type | None = None

    def types(self) -> list[type]:
        return [kind for kind in (self.answer, self.request, self.chunk) if kind is not None]


OPERATIONS = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a chat",
        ChatCompletion,
        ChatCompletionRequest,
        ChatCompletionChunk,
    ),
    Operation(
        "post", "/v1/completions", "Continue prompts", TextCompletion, CompletionRequest, TextCompletion
    ),
    Operation("get", "/v1/models", "What is served", ModelList),
    Operation("get", "/v1/models/{name}", "One model", Model),
    Operation("post", "/tokenize", "A prompt or messages to token ids", TokenizeAnswer, TokenizeRequest),
    Operation("post", "/detokenize", "Token ids to text", DetokenizeAnswer, DetokenizeRequest),
    Operation("get", "/version", "The version of Nybble", Version),
    Operation("get", "/health", "Whether the engine runs", Status),
    Operation("get", "/ready", "Whether the engine decodes", Status),
)


def describe_api() -> dict[str, Any]:
    """The document. Routes that are not OpenAI's or vLLM's JSON, such as metrics, are left out."""
    types = dict.fromkeys(kind for operation in OPERATIONS for kind in operation.types())
    kinds = [*types, ErrorAnswer]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Nybble", "version": version("nybble")},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],  # a server may have no keys
    }


def _operation(operation: Operation, schemas: dict[type, dict[str, Any]]) -> dict[str, Any]:
    content = {"application/json": {"schema": schemas[operation.answer]}}
    if operation.chunk is not None:
        content["text/event-stream"] = {"schema": _event(schemas[operation.chunk])}
    error = {"description": "An error", "content": {"application/json": {"schema": schemas[ErrorAnswer]}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer", "content": content}}
        | dict.fromkeys(ERROR_STATUSES, error),
    }
    if operation.request is not None:
        body = {"application/json": {"schema": schemas[operation.request]}}
        described["requestBody"] = {"required": True, "content": body}
    if "{name}" in operation.path:
        described["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return described


def _event(chunk: dict[str, Any]) -> dict[str, Any]:
    """An event of a stream. `contentSchema` is what its data hold as JSON."""
    piece = {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk}
    data = {"anyOf": [piece, {"const": "[DONE]"}]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}
