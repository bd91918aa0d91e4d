"""What a request says of the form of its answer, as the engine takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from nybble.engine.grammar.grammar import Grammar, Thought
from nybble.engine.tokenizer import Tokenizer
from nybble.server.errors import BadRequestError
from nybble.server.requests.grammar_fields import FormFields, ResponseFormat

_ANY_OBJECT = {"type": "object"}


def asked_grammar(request: FormFields, thought: Thought | None) -> Grammar | None:
    """The one grammar that is asked for, if any; thought: as in `Grammar`.

    Raises:
        BadRequestError: there are several, or it is no grammar at first sight.
    """
    grammars = list(_asked(request, thought))
    if len(grammars) > 1:
        first, second = (grammar.parameter for grammar in grammars[:2])
        raise BadRequestError(f"{second}: not together with {first}", second)
    if grammars and request.ignore_eos:
        raise BadRequestError(f"ignore_eos: not together with {grammars[0].parameter}", "ignore_eos")
    return grammars[0] if grammars else None


def coming_thought(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> Thought | None:
    """The thought with which the answer may begin, or None if it begins with none.

    GLM-4.7's prompts open the thought, GLM-4.5's and 4.6's leave that to the model; all close it where there
    shall be none.
    """
    begin, end, turn = map(tokenizer.added_token_id, ("<think>", "</think>", "<|assistant|>"))
    if begin is None or end is None:
        return None
    for token_id in reversed(prompt_token_ids):
        if token_id == begin:
            return Thought(end_token_id=end)
        if token_id == turn:
            return Thought(end_token_id=end, start_token_id=begin)
        if token_id == end:
            return None
    return None


def open_thought(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> Thought | None:
    """The same for a prompt that the client wrote whole: there is a thought if it ends in one."""
    thought = coming_thought(tokenizer, prompt_token_ids)
    return thought if thought is not None and thought.start_token_id is None else None


def _asked(request: FormFields, thought: Thought | None) -> Iterator[Grammar]:
    if request.response_format is not None and request.response_format.type != "text":
        yield _of_format(request.response_format, thought)
    asked = request.structured_outputs
    if asked is not None:
        prefix = "structured_outputs."
        yield from _of_texts(prefix, thought, asked.json, asked.regex, asked.choice, asked.grammar)
        if asked.json_object:
            yield _of_schema(_ANY_OBJECT, f"{prefix}json_object", thought)
    r = request
    yield from _of_texts("guided_", thought, r.guided_json, r.guided_regex, r.guided_choice, r.guided_grammar)


def _of_format(asked: ResponseFormat, thought: Thought | None) -> Grammar:
    if asked.type == "json_object":
        return _of_schema(_ANY_OBJECT, "response_format", thought)
    name = "response_format.json_schema"
    if asked.json_schema is None:
        raise BadRequestError(f"{name}: missing for type 'json_schema'", name)
    schema = _ANY_OBJECT if asked.json_schema.schema is None else asked.json_schema.schema
    return _of_schema(schema, f"{name}.schema", thought, is_lenient=not asked.json_schema.strict)


def _of_texts(
    prefix: str,
    thought: Thought | None,
    schema: dict[str, Any] | str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> Iterator[Grammar]:
    if schema is not None:
        yield _of_schema(schema, f"{prefix}json", thought)
    if regex is not None:
        yield Grammar(kind="regex", text=regex, thought=thought, parameter=f"{prefix}regex")
    if choice is not None:
        yield _of_lark(_alternatives(choice), f"{prefix}choice", thought)
    if grammar is not None:
        yield _of_lark(grammar, f"{prefix}grammar", thought)


def _of_schema(
    schema: dict[str, Any] | str, parameter: str, thought: Thought | None, is_lenient: bool = False
) -> Grammar:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return Grammar(kind="json_schema", text=text, is_lenient=is_lenient, thought=thought, parameter=parameter)


def _of_lark(text: str, parameter: str, thought: Thought | None) -> Grammar:
    return Grammar(kind="lark", text=text, thought=thought, parameter=parameter)


def _alternatives(answers: list[str]) -> str:
    return "start: " + " | ".join(json.dumps(answer, ensure_ascii=False) for answer in answers)
