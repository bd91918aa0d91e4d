from __future__ import annotations

import json
from typing import Any

import pytest

from nybble.server.errors import BadRequestError, NotFoundError
from nybble.server.requests.completion_request import (
    CompletionJob,
    parse_completion_request,
    prepare_completion_request,
)
from nybble.server.served_model import ServedModel


def _prepare(model: ServedModel, /, **fields: Any) -> CompletionJob:
    body = json.dumps({"model": "tiny", "prompt": "hi"} | fields).encode()
    return prepare_completion_request(parse_completion_request(body), model)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("hi", [(104, 105)]),
        (["hi", "a"], [(104, 105), (97,)]),
        ([104, 105], [(104, 105)]),
        ([[104], [105, 97]], [(104,), (105, 97)]),
    ],
)
def test_the_four_kinds_of_prompt(model: ServedModel, prompt: Any, wanted: list[tuple[int, ...]]) -> None:
    assert [one.token_ids for one in _prepare(model, prompt=prompt).prompts] == wanted


def test_a_prompt_may_hold_special_tokens(model: ServedModel, end_id: int) -> None:
    assert _prepare(model, prompt="a<|end|>").prompts[0].token_ids == (97, end_id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [5, [5]]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [5, 100_000]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "prompt"),
        ({"prompt": "x" * 64}, "prompt"),
        ({"max_tokens": 63}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 9}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_a_bad_field_is_named(model: ServedModel, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        _prepare(model, **fields)
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x"},
        {"best_of": 2},
        {"prompt_logprobs": 1},
        {"use_beam_search": True},
        {"skip_special_tokens": False},
        {"truncate_prompt_tokens": 5},
    ],
)
def test_what_is_not_there_is_refused_by_name(model: ServedModel, fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(BadRequestError, match=f"^{name}: not supported") as caught:
        _prepare(model, **fields)
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "text"}}, None, None),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "a"}}, "regex", "a"),
        ({"guided_choice": ["a", "b"]}, "lark", 'start: "a" | "b"'),
        ({"guided_json": {}}, "json_schema", "{}"),
    ],
)
def test_the_form_of_an_answer(
    model: ServedModel, fields: dict[str, Any], kind: str | None, text: str | None
) -> None:
    for prompt in _prepare(model, prompt=["x", "y"], **fields).prompts:
        grammar = prompt.sampling.grammar
        assert (grammar and grammar.kind, grammar and grammar.text) == (kind, text)
        assert grammar is None or grammar.thought is None


def test_two_forms_are_refused(model: ServedModel) -> None:
    with pytest.raises(BadRequestError, match="not together with guided_json"):
        _prepare(model, guided_json={}, guided_choice=["a"])


def test_harmless_and_unknown_fields_change_nothing(model: ServedModel) -> None:
    fields = {"suffix": None, "best_of": 1, "user": "ann", "truncated": 5, "echo": False, "stop": []}
    assert _prepare(model, **fields) == _prepare(model)


def test_another_model(model: ServedModel) -> None:
    with pytest.raises(NotFoundError, match="'huge' is not served here"):
        _prepare(model, model="huge")


@pytest.mark.parametrize(("num_prompt", "wanted"), [(2, 16), (60, 4), (63, 1)])
def test_max_tokens_is_openais_16_by_default_or_the_room_left(
    model: ServedModel, num_prompt: int, wanted: int
) -> None:
    assert _prepare(model, prompt=[97] * num_prompt).prompts[0].sampling.max_tokens == wanted


def test_what_is_asked(model: ServedModel) -> None:
    job = _prepare(model, temperature=0, logprobs=3, stop="x", cache_salt="s", priority=2, timeout=5, n=2)
    sampling = job.prompts[0].sampling
    assert (sampling.temperature, sampling.num_logprobs, job.stop_strings) == (0, 3, ("x",))
    assert (job.cache_salt, job.priority, job.timeout, job.num_choices) == ("s", 2, 5, 2)


@pytest.mark.parametrize("prompt", ["a€<|end|>", "a\ufffd"])
def test_an_echo_is_the_prompts_text(model: ServedModel, prompt: str) -> None:
    token_ids = list(model.tokenizer.encode(prompt))
    assert _prepare(model, prompt=prompt, echo=True).prompts[0].echo == prompt
    assert _prepare(model, prompt=token_ids, echo=True).prompts[0].echo == prompt
    assert _prepare(model, prompt=prompt).prompts[0].echo == ""


@pytest.mark.parametrize(("echo", "logprobs", "wanted"), [(True, 3, 3), (True, None, None), (None, 3, None)])
def test_an_echo_with_logprobs_has_the_prompts(
    model: ServedModel, echo: bool | None, logprobs: int | None, wanted: int | None
) -> None:
    (prompt,) = _prepare(model, echo=echo, logprobs=logprobs, max_tokens=0).prompts
    assert (prompt.sampling.num_prompt_logprobs, prompt.has_scores) == (wanted, wanted is not None)
    assert prompt.sampling.max_tokens == 0


def test_too_many_logprobs_of_prompts(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.server.requests.completion_request.MAX_PROMPT_LOGPROBS", 11)
    fields = {"prompt": ["ab", "abc"], "echo": True}
    _prepare(model, logprobs=1, **fields)  # 5 tokens, 2 numbers each
    with pytest.raises(BadRequestError, match="15 numbers") as caught:
        _prepare(model, logprobs=2, **fields)
    assert caught.value.param == "logprobs"
